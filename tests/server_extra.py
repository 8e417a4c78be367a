"""Import this before anything of the server: it skips the test file where the extra is not installed."""

import pytest

for package in ("fastapi", "uvicorn", "prometheus_client", "multipart", "websockets"):
    pytest.importorskip(package, reason=f"{package}: pip install 'nar-speech[serve]'")
