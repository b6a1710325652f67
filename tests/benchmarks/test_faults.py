from pathlib import Path

import pytest
from benchmarks.faults import JUDGES, TYPED_IS_RIGHT, about, judgement, run


@pytest.fixture
def script(tmp_path: Path):
    def write(text: str) -> Path:
        path = tmp_path / "script.py"
        path.write_text(text)
        return path

    return write


def test_every_named_script_has_a_judge() -> None:
    assert JUDGES.keys() >= TYPED_IS_RIGHT


def test_a_right_value_a_wrong_one_and_no_judge_are_told_apart(script) -> None:
    good = run(script("print('same key:', False)"), 20)
    bad = run(script("print('same key:', True)"), 20)
    assert judgement("edited_criterion", good) == "right"
    assert judgement("edited_criterion", bad).startswith("**wrong**")
    assert judgement("unheard_of", good) == "not judged"


def test_only_a_typed_error_may_stand_for_a_value_and_only_where_it_is_the_answer(script) -> None:
    typed = run(script("class InputError(Exception): ...\nraise InputError('x: say y')"), 20)
    raw = run(script("print('once')\nraise IndexError('list index out of range')"), 20)
    assert typed.failure == "InputError: x: say y"
    assert judgement("early_exit_prune", typed) == "typed error"
    assert judgement("threads", typed).startswith("**wrong**")
    assert judgement("early_exit_prune", raw).startswith("**wrong**")
    assert raw.lines == ["once", "IndexError: list index out of range"]


def test_a_script_that_hangs_is_killed_and_wrong(script) -> None:
    out = run(script("import time\nprint('on', flush=True)\ntime.sleep(60)"), 0.5)
    assert "TimeoutExpired" in out.failure
    assert judgement("threads", out).startswith("**wrong**")


def test_unreadable_output_is_wrong_and_not_an_error() -> None:
    empty = run(Path(__file__).with_name("nothing.py"), 20)
    assert judgement("averaged_masks", empty).startswith("**wrong**")


def test_what_a_script_is_about_is_the_first_sentence_of_its_comment(script) -> None:
    path = script("# A cache is kept: over two\n# lines. The rest is left out.\nimport os\n")
    assert about(path) == "A cache is kept: over two lines."
