"""Names that are none of ours are answered with those that are, in Python and on the command line."""

from __future__ import annotations

import re

import pytest

import oocattn
from oocattn.cli.main import main

HINTS = {
    "is_causal": "it is called {causal} here, and the last query is at the last key",
    "softmax_scale": "it is called {scale} here",
    "cu_seq_lens": "it is called {cu_seqlens_q} here",
    "window": "it is {window_size}, keys before and after the query's own",
    "attn_mask": "a mask is asked for with {causal}, {window_size}, {cu_seqlens_q}, {seqused_k} and {prefix}",
    "block_mask": "a mask is asked for with {causal}",
    "attn_bias": "only {alibi_slopes}, {softcap} and an array key_bias in the dataset",
    "score_mod": "only {alibi_slopes}",
    "attention_mask": "say with {seqused_k} how many keys",
    "segment_ids": "say with {cu_seqlens_q} where",
    "max_seqlen_q": "leave it out: {cu_seqlens_q} says it",
    "dropout_p": "there is no dropout: leave it out",
    "enable_gqa": "leave it out: query heads share",
    "sinktokens": "did you mean {sink_tokens}?",
}
"""Names of other libraries, or misspelt, and words of the advice that they are answered with."""


@pytest.mark.parametrize("name", HINTS)
def test_an_argument_of_another_library_is_answered_with_ours(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    ours = re.findall(r"{(\w+)}", HINTS[name])
    with pytest.raises(TypeError) as refused:
        oocattn.attention("d.zarr", "out.zarr", **{name: True})
    assert HINTS[name].format_map({each: each for each in ours}) in str(refused.value)
    option = "--" + name.replace("_", "-")
    with pytest.raises(SystemExit) as ended:
        main(["run", "d.zarr", "out.zarr", option, "1"])
    options = {each: "--" + each.replace("_", "-") for each in ours}
    found = capsys.readouterr().err
    assert (ended.value.code, found.count("\n")) == (2, 1)
    assert f"oocattn run: {option} is not expected: " in found
    assert HINTS[name].format_map(options) in found


def test_what_is_unlike_any_argument_has_no_advice() -> None:
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'threads'$"):
        oocattn.plan("d.zarr", threads=2)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["--learnable-sink", "-1,2"], "--learnable-sink: expected one argument (one that begins with a minus: --learn"),
        (["--window-size", "3"], "--window-size: expected 2 arguments, LEFT RIGHT;"),
        (["--queries", ":60"], "--queries: ':60': expected START:STOP;"),
        (["--heads", "0:2"], "--heads: '0:2': expected whole numbers, H,H,...;"),
        (["--caus"], "--caus is not expected: did you mean --causal?;"),
        (["more"], "more is not expected;"),
    ],
)
def test_bad_usage_is_one_line_that_says_what_is_expected(
    words: list[str], found: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["plan", "d.zarr", *words])
    printed = capsys.readouterr().err
    assert (ended.value.code, printed.count("\n")) == (2, 1)
    assert printed.startswith(f"oocattn plan: {found}")
    assert printed.endswith("; see oocattn plan --help\n")
