"""The server: OpenAI HTTP and Realtime, FunASR WebSocket, Wyoming and a raw PCM WebSocket on one engine.

``pip install 'nar-speech[serve]'``, then ``nar-speech serve``. Start reading at :mod:`nar_speech.server.app`.
"""
