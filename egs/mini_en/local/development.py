"""Which recordings are for development: never trained on, chosen by name, so every machine takes the same."""

from common import share

DEV_CLIPS = 40  # of a source at most, ljspeech32 aside


def is_dev(row: dict) -> bool:
    """Which real clips are for development; decided by name, so every machine makes the same choice."""
    if row["source"] == "ljspeech32":
        return True
    if row["source"] in ("librispeech251", "speechocean762"):
        return share(f"dev {row['speaker']}") < 0.05
    return row["source"] in ("coffee_commands", "asterisk") and share(f"dev {row['name']}") < 0.05


def split(real: list[dict]) -> tuple[list[dict], list[dict]]:
    """(train, dev); where a source has more than DEV_CLIPS of development the rest is left unused."""
    train = [row for row in real if not is_dev(row)]
    dev: list[dict] = []
    for source in sorted({row["source"] for row in real}):
        rows = [row for row in real if row["source"] == source and is_dev(row)]
        dev += sorted(rows, key=lambda row: share(row["name"]))[:DEV_CLIPS]
    return train, dev
