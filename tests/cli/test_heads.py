"""`--qkv-heads`: numbers of heads, or a message that says what is expected."""

import pytest

from oocattn.cli.main import main


@pytest.mark.parametrize("text", ["2,", ",2", "two", "0,1", "2,-1", "2,1,1", "", "2.5"])
def test_heads_that_are_no_numbers_are_refused_in_words_of_the_command(text, capsys):
    with pytest.raises(SystemExit):
        main(["plan", "--qkv", "qkv.npy", "--layout", "bnf", f"--qkv-heads={text}"])
    assert f"--qkv-heads: {text!r}: expected HQ,HKV or one number for both, each at least 1" in capsys.readouterr().err
