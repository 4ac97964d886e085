"""The command `survey`: what it prints, its exit codes, and how it goes on."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from support import normal_arrays, write_dataset

import oocattn
from oocattn.cli.main import main
from oocattn.naming import on_command_line
from oocattn.pipelines.attempt import Attempt

ARRAYS = ("received", "entropy", "top_keys", "top_weights", "pooled")

INLINE = ["--engine", "inline", "--no-progress"]

TOKENS = 60


@pytest.fixture
def result(fast_path: Path) -> str:
    dataset = write_dataset(fast_path / "dataset.zarr", normal_arrays(TOKENS, heads=4, kv_heads=4))
    oocattn.attention(dataset, fast_path / "out.zarr", causal=True, engine="inline")
    return str(fast_path / "out.zarr")


def test_the_plan_comes_first_and_then_what_was_added_and_how_long_it_took(
    result: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = kept(monkeypatch)
    given = ["survey", result, "--top", "3", "--pool", "10", *INLINE]
    assert main(given) == 0
    printed = capsys.readouterr()
    plan, _, added = printed.out.partition("\n\npath ")
    with on_command_line():
        assert plan == str(found[0].plan)
    assert "second pass  over the pairs of a result; gives received, entropy, top_keys, pooled\n" in plan
    lines = [
        f"        {result}",
        f"received     [1, 4, {TOKENS}] float32",
        f"entropy      [1, 4, {TOKENS}] float32",
        f"top_keys     [1, 4, {TOKENS}, 3] int64",
        f"top_weights  [1, 4, {TOKENS}, 3] float32",
        "pooled       [1, 4, 10, 10] float32",
    ]
    *arrays, time = added.splitlines()
    assert (arrays, printed.err) == (lines, "")
    assert re.fullmatch(r"time         .* s, of which the pass took .* s \(predicted .* s\)", time)
    assert zarr.open_array(result, path="entropy", mode="r").shape == (1, 4, TOKENS)
    assert main([*given, "--timeline", "t.json"]) == 0
    words = f"{result} has these arrays already; nothing was computed, and t.json not written"
    assert capsys.readouterr().out == "\n".join([words, f"path {lines[0]}", *lines[1:], ""])


def test_the_pass_that_is_resumed_says_what_is_left(
    result: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ["survey", result, "--arrays", "entropy", *INLINE]
    with monkeypatch.context() as patch:
        patch.setattr(Attempt, "drive", late_after(Attempt.drive))
        assert main([*given, "--time-limit", "1h"]) == 75
    capsys.readouterr()
    assert main(given) == 0
    printed = capsys.readouterr().out
    assert "\nresumed      0 of 4 subproblems are left\n" in printed
    assert " since it was resumed (predicted " in printed.splitlines()[-1]


def test_the_kernel_of_the_pass_may_be_named(
    result: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = kept(monkeypatch)
    assert main(["survey", result, "--arrays", "entropy", "--kernel", "weights", *INLINE]) == 0
    assert found[0].plan.kernel == "weights"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["survey", result, "--arrays", "received", "--kernel", "hopper-survey", *INLINE]) == 1
    assert "torch finds no NVIDIA GPU" in capsys.readouterr().err


def kept(monkeypatch: pytest.MonkeyPatch) -> list[oocattn.Survey]:
    """What `oocattn.survey` returns from now on."""
    found, real = list[oocattn.Survey](), oocattn.survey

    def survey(*given: Any, **options: Any) -> oocattn.Survey:
        found.append(real(*given, **options))
        return found[-1]

    monkeypatch.setattr(oocattn, "survey", survey)
    return found


def test_the_document_is_that_of_python(
    result: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found, given = kept(monkeypatch), ["survey", result, "--arrays", "pooled, entropy", "--mean-heads", "--json", *INLINE]
    assert main(given) == 0
    printed = capsys.readouterr()
    document = json.loads(printed.out)
    assert (document, printed.err) == (found[0].to_json(), "")
    assert document["arrays"]["pooled"]["shape"] == [1, 1, TOKENS, TOKENS]
    assert list(document["arrays"]) == ["entropy", "pooled"]
    assert document["plan"]["seconds"] == document["report"]["predicted_seconds"]
    assert main(given) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out) == {**document, "seconds": None, "plan": None, "report": None}
    assert printed.err == f"{result} has these arrays already; nothing was computed\n"


@pytest.mark.parametrize("json_", [[], ["--json"]], ids=["text", "json"])
def test_another_survey_is_refused_in_one_line_that_names_the_option(
    json_: list[str], result: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["survey", result, "--arrays", "top_keys", *INLINE]
    assert main(given) == 0
    capsys.readouterr()
    assert main([*given, "--top", "2", *json_]) == 1
    printed = capsys.readouterr()
    (line,) = printed.err.splitlines()
    assert (printed.out, line.endswith("replace it with --overwrite")) == ("", True)
    assert main([*given, "--top", "2", "--overwrite"]) == 0


WRONG: dict[str, tuple[list[str], int]] = {
    "a word that is no array": (["--arrays", "what"], 2),
    "an array that comes with another": (["--arrays", "top_weights"], 2),
    "no array": (["--arrays"], 2),
    "an unknown option": (["--heads"], 2),
    "no top key": (["--top", "0"], 2),
    "a top that is no number": (["--top", "many"], 2),
    "too many top keys": (["--top", "129"], 2),
    "too many pools": (["--pool", "4097"], 2),
    "no memory": (["--host-memory", "1"], 1),
    "a kernel of runs": (["--kernel", "cpu"], 2),
    "a kernel that proves": (["--kernel", "hopper-weights"], 2),
    "a drawing of another kind": (["--draw", "map.svg"], 2),
    "a drawing without a map": (["--draw", "map.png", "--arrays", "entropy"], 2),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_wrong_is_one_line_on_standard_error(
    wrong: str, result: str, capsys: pytest.CaptureFixture[str], here: Path
) -> None:
    words, code = WRONG[wrong]
    try:
        found: Any = main(["survey", result, *words, *INLINE])
    except SystemExit as ended:
        found = ended.code
    printed = capsys.readouterr()
    assert (found, printed.out, len(printed.err.splitlines())) == (code, "", 1), printed.err
    assert {path.name for path in Path(result).iterdir()} == {"zarr.json", "out", "lse"}
    assert not list(here.iterdir())


@pytest.mark.parametrize("words", [["map.svg"], ["map.png", "--arrays", "entropy"]])
def test_a_drawing_that_is_refused_is_called_by_its_option(
    words: list[str], result: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["survey", result, "--draw", *words, *INLINE])
    assert capsys.readouterr().err.startswith("oocattn survey: --draw ")


def test_what_is_no_result_is_one_line(fast_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["survey", str(fast_path / "nothing.zarr"), *INLINE]) == 1
    printed = capsys.readouterr()
    assert "no finished result" in printed.err
    assert (printed.out, len(printed.err.splitlines())) == ("", 1)
    assert not list(fast_path.iterdir())


def test_a_time_limit_ends_with_75_and_the_same_command_goes_on(
    result: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, fast_path: Path
) -> None:
    given = ["survey", result, *INLINE]
    with monkeypatch.context() as patch:
        patch.setattr(Attempt, "drive", late_after(Attempt.drive))
        assert main([*given, "--time-limit", "1h"]) == 75
    (line,) = capsys.readouterr().err.splitlines()
    assert "time limit" in line
    assert line.endswith("; what is done is kept: give the same command again")
    assert {path.name for path in Path(result).iterdir()} == {"zarr.json", "out", "lse"}
    assert main(["status", f"{result}.oocattn/survey.zarr"]) == 0
    assert f"oocattn survey {result}" in capsys.readouterr().out
    assert main(given) == 0
    expected = oocattn.survey(result, engine="inline")
    assert np.asarray(expected.arrays["received"]).sum() == pytest.approx(4 * TOKENS, rel=1e-5)
    assert not list(fast_path.glob("*.oocattn/survey*"))


def test_the_pass_of_another_survey_is_kept_and_the_line_says_with_which_options_it_began(
    result: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ["survey", result, "--arrays", "received,top_keys", *INLINE]
    with monkeypatch.context() as patch:
        patch.setattr(Attempt, "drive", late_after(Attempt.drive))
        assert main([*given, "--time-limit", "1h"]) == 75
    capsys.readouterr()
    assert main(["survey", result, "--arrays", "entropy", *INLINE]) == 1
    printed = capsys.readouterr()
    (line,) = printed.err.splitlines()
    words = "it began with --arrays received,top_keys --top 8): ask for it as then, or throw it away with --overwrite"
    assert (printed.out, line.endswith(words)) == ("", True), line
    assert main(["survey", result, "--arrays", "entropy", "--overwrite", *INLINE]) == 0


def late_after(drive: Any) -> Any:
    """The drive of an attempt whose time is over when its first work is done."""

    def late(attempt: Attempt) -> None:
        drive(attempt)
        raise oocattn.TimeLimitError("time limit reached")

    return late
