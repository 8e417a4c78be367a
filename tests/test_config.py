"""Configuration: strict keys and types, layers of files and words, one-line errors."""

from dataclasses import dataclass, field
from typing import Literal

import pytest

from nar_speech import config
from nar_speech.errors import ConfigError


@dataclass(frozen=True)
class Inner:
    width: int = 4
    names: tuple[str, ...] = ()
    pair: tuple[int, float] = (1, 2.0)


@dataclass(frozen=True)
class Outer:
    lr: float
    kind: Literal["a", "b"] = "a"
    inner: Inner = field(default_factory=Inner)
    extra: dict[str, float] = field(default_factory=dict)
    maybe: int | None = None
    table: dict[int, int] = field(default_factory=dict)

    def __post_init__(self):
        if self.lr <= 0:
            raise ValueError(f"lr must be positive, got {self.lr}")


def test_files_then_words(tmp_path):
    (tmp_path / "a.yaml").write_text("lr: 1\ninner: {width: 8}\n")
    (tmp_path / "b.yaml").write_text("inner: {names: [x, y]}\nextra: {z: 2}\n")
    got = config.load(
        Outer, [tmp_path / "a.yaml", tmp_path / "b.yaml"], ["kind=b", "inner.width=16", "maybe=3"]
    )
    assert got == Outer(lr=1.0, kind="b", inner=Inner(16, ("x", "y")), extra={"z": 2.0}, maybe=3)


def test_round_trip(tmp_path):
    want = Outer(lr=0.5, inner=Inner(names=("q",)), maybe=None, table={7: 8})
    config.write_yaml(want, tmp_path / "c.yaml")
    assert config.load(Outer, [tmp_path / "c.yaml"]) == want


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lr: 1\nlrr: 2", "unknown key 'lrr'; valid keys: extra, inner, kind, lr, maybe, table"),
        ("lr: 1\ninner: {widht: 2}", "inner: unknown key 'widht'"),
        ("kind: a", "key 'lr' is required"),
        ("lr: fast", "lr: expected float, got 'fast'"),
        ("lr: true", "lr: expected float, got True"),
        ("lr: .nan", "lr: got nan; must be a finite number"),
        ("lr: -.inf", "lr: got -inf; must be a finite number"),
        ("lr: 1\nkind: c", "kind: got 'c'; valid values: a, b"),
        ("lr: 1\ninner: {width: 1.5}", "inner: width: expected int, got 1.5"),
        ("lr: 1\ninner: {names: abc}", "inner: names: expected a list"),
        ("lr: 1\ninner: {pair: [1]}", "expected 2 values, got 1"),
        ("lr: 1\ninner: 3", "inner: expected a mapping"),
        ("lr: 1\nmaybe: x", "maybe: expected int"),
        ("lr: 1\ntable: {x: 1}", "table: expected whole numbers as keys, got 'x'"),
        ("lr: -1", "lr must be positive"),
        ("- 1", "expected a mapping"),
        ("a: [1", "not valid YAML"),
        ("lr: ${nowhere}", "interpolation"),
    ],
)
def test_mistakes_are_named_in_one_line(tmp_path, text, message):
    file = tmp_path / "x.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        config.load(Outer, [file])
    assert message in str(caught.value)
    assert "x.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_file_and_malformed_word(tmp_path):
    with pytest.raises(ConfigError, match=r"gone\.yaml: no such configuration file"):
        config.load(Outer, [tmp_path / "gone.yaml"])
    with pytest.raises(ConfigError, match="written key=value"):
        config.load(Outer, [], ["lr"])
    with pytest.raises(ConfigError, match=r"^overrides lr=\[1: [^\n]+$"):
        config.load(Outer, [], ["lr=[1"])


def test_what_fails_inside_blame_is_a_config_error_that_names_the_place():
    for error in (
        RuntimeError("sizes\nof two lines"),
        ZeroDivisionError(),
        MemoryError(),
        ConfigError("a: bad"),
    ):
        with pytest.raises(ConfigError, match=r"^m\.yaml: network: [^\n]+$"), config.blame("m.yaml: network"):
            raise error
    with pytest.raises(KeyboardInterrupt), config.blame("m.yaml"):
        raise KeyboardInterrupt
