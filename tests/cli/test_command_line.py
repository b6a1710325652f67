"""The command line as a user meets it: output, one-line errors, exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import slimkit
from slimkit.cli.main import main

RECIPE = {
    "name": "small",
    "data": {"source": "digits", "image_size": 8, "batch_size": 32, "limit": 96},
    "model": {"name": "cli_network:build"},
    "stages": {"train": {"type": "train", "epochs": 1, "lr": 0.05, "precision": "fp32"}},
    "variants": {"baseline": [], "trained": ["train"]},
    "measure": {"seconds": 0.02, "parity_batches": 1, "memory": False},
}
Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Cli:
    """Run the command line → exit code, standard output, standard error."""

    def run(*arguments: object) -> tuple[int, str, str]:
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "cli_network.py").write_text(
        "from torch import nn\ndef build(num_classes=10):\n    return nn.Sequential("
        "nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, num_classes))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(RECIPE))
    return path


def test_help_names_every_verb_and_imports_no_torch() -> None:
    script = (
        "import sys\n"
        "from slimkit.cli.main import main\n"
        "code = main(['--help'])\n"
        "assert not {'torch', 'onnx', 'matplotlib', 'pydantic'} & sys.modules.keys()\n"
        "sys.exit(code)\n"
    )
    source = str(Path(slimkit.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": source},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for verb in ("run", "profile", "explain", "benchmark", "compare", "report", "list", "schema"):
        assert verb in done.stdout


def test_version_and_bare_call(cli: Cli) -> None:
    assert cli("--version")[:2] == (0, f"slimkit {slimkit.__version__}\n")
    assert "Usage" in cli()[1]


BAD = [
    (["rnu"], "No such command 'rnu'"),
    (["run"], "Missing argument"),
    (["run", "--bad", "x.yaml"], "No such option: --bad"),
    (["run", "quickstrt"], "did you mean 'quickstart'"),
    (["profile", "slimkit:resnet2"], "'resnet20'"),
    (["profile", "resnet20"], "slimkit:resnet20"),
    (["profile", "slimkit:resnet20", "--input", "1,3,a"], "--input: expected positive numbers"),
    (["profile", "slimkit:resnet20", "--input", "1,1,8,8"], "conv1"),
    (["profile", "slimkit:resnet20", "--arg", "classes=3"], "the factory refuses"),
    (["profile", "slimkit:resnet20", "--arg", "3"], "--arg: expected name=value"),
    (["explain", "network.onnx"], "network.onnx: this is an ONNX file"),
    (["explain", "slimkit:resnet20", "--ratio", "1.5"], "ratio"),
    (["explain", "slimkit:resnet20", "--criterion", "l3"], "unknown criterion 'l3'"),
    (["explain", "slimkit:resnet20", "--ignore", "layer9"], "'layer9' matches no"),
    (["benchmark", "nowhere.onnx"], "nowhere.onnx"),
    (["benchmark", "nowhere.onnx", "--threads", "0"], "--threads"),
    (["compare", "nowhere", "elsewhere"], "nowhere"),
    (["report", "nowhere"], "nowhere"),
    (["list", "critera"], "'criteria'"),
    (["teach", "serve", "quickstart", "--client-ca", "ca.pem"], "--client-ca: students'"),
    (["teach", "serve", "quickstart", "--tls-cert", "a.pem"], "--tls-cert: a certificate and"),
    (["teach", "token", "nowhere", "--hours", "inf"], "--hours"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[" ".join(b[0]) for b in BAD])
def test_bad_input_is_one_line_on_stderr_and_exit_code_2(
    cli: Cli, arguments: list[str], message: str
) -> None:
    code, out, err = cli(*arguments)
    assert code == 2
    assert out == ""
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1
    assert message in err


def test_profile_prints_a_table_or_json(cli: Cli) -> None:
    code, out, _ = cli("profile", "slimkit:resnet20", "--depth", "1")
    assert code == 0
    assert "layer3" in out
    code, out, _ = cli("profile", "slimkit:resnet20", "--json", "--arg", "in_channels=1")
    assert json.loads(out)["input_shapes"] == [[1, 1, 32, 32]]


def test_explain_tells_which_channels_go_and_saves_the_plan(cli: Cli, tmp_path: Path) -> None:
    code, out, _ = cli(
        "explain", "slimkit:resnet20", "--macs", "0.5", "--save", tmp_path / "plan.json"
    )
    assert code == 0
    assert "layer3.2.conv1" in out
    assert slimkit.Plan.load(tmp_path / "plan.json").kind == "prune"


def test_list_shows_everything_or_one_kind(cli: Cli) -> None:
    code, out, _ = cli("list")
    assert code == 0
    names = ("slimkit:resnet20", "qat", "fpgm", "global", "mimic", "percentile", "onnxruntime")
    assert all(name in out for name in (*names, "parquet", "imagefolder"))
    assert cli("list", "criteria")[1].split()[0] == "bn_scale"


def test_schema_and_doctor_print_json(cli: Cli, tmp_path: Path) -> None:
    code, out, _ = cli("schema")
    assert code == 0
    assert "stages" in json.loads(out)["properties"]
    assert cli("schema", "--out", tmp_path / "schema.json")[:2] == (0, "")
    assert json.loads((tmp_path / "schema.json").read_text()) == json.loads(out)
    assert "cpu" in json.loads(cli("doctor", "--json")[1])
    assert "runtimes" in cli("doctor")[1]


def test_a_run_its_dry_run_its_report_and_a_comparison(
    cli: Cli, recipe: Path, tmp_path: Path
) -> None:
    out_folder = tmp_path / "out"
    code, out, _ = cli("run", recipe, "--out", out_folder, "--dry-run")
    assert code == 0
    assert "to run" in out
    assert not out_folder.exists()

    code, out, err = cli("run", recipe, "--out", out_folder)
    assert code == 0
    assert "trained" in out
    assert str(out_folder / "report.html") in out
    assert "stage    train" in err
    assert "cached" in cli("run", recipe, "--out", out_folder, "--dry-run")[1]

    missed = "require={bytes_ratio: 0.5}"
    code, out, err = cli("run", recipe, "--out", tmp_path / "b", "--set", missed, "--quiet")
    assert code == 1
    (line,) = err.splitlines()
    assert line.startswith("error: require: bytes_ratio is 1")
    assert line.endswith("required is at most 0.5")
    assert "trained" in out  # the table is there all the same

    (out_folder / "report.html").unlink()
    assert cli("report", out_folder)[0] == 0
    assert (out_folder / "report.html").exists()
    code, out, _ = cli("compare", out_folder, tmp_path / "b", "--markdown")
    assert code == 0
    assert "require.bytes_ratio" in out

    files = [out_folder / "variants" / name / "model.onnx" for name in ("baseline", "trained")]
    code, out, _ = cli("benchmark", *files, "--seconds", "0.02", "--json")
    assert code == 0
    assert set(json.loads(out)) == {str(file) for file in files}


def test_quantize_writes_an_int8_file_and_says_what_is_integer(
    cli: Cli, recipe: Path, tmp_path: Path
) -> None:
    out_file = tmp_path / "int8.onnx"
    code, out, _ = cli(
        "quantize", "cli_network:build", "--data", "digits", "--image-size", "8", "--out", out_file
    )
    assert code == 0
    assert "1/1 convolutions" in out
    assert out_file.stat().st_size > 0
    code, _, err = cli(
        "quantize", "cli_network:build", "--data", "digits", "--image-size", "8",
        "--out", tmp_path / "other.onnx", "--skip", "9",
    )  # fmt: skip
    assert code == 2
    assert "skip: the pattern '9' matches no" in err
    assert not (tmp_path / "other.onnx").exists()


def test_quantize_takes_bits_methods_a_target_and_a_limit(
    cli: Cli, recipe: Path, tmp_path: Path
) -> None:
    common = ["quantize", "cli_network:build", "--data", "digits", "--image-size", "8", "--out"]
    code, out, err = cli(
        *common, tmp_path / "a.onnx", "--target", "onnxruntime-vnni", "--weight-bits", "4",
        "--max-drop", "100",
    )  # fmt: skip
    assert code == 0, err
    assert "target onnxruntime-vnni" in out
    assert err == "its weights are random: no --checkpoint was given\n"  # and it did not take long
    for option, value, message in (
        ("--weight-bits", "four", "--weight-bits: expected a number, or PATTERN=NUMBER"),
        ("--weight-bits", "nothing=4", "weight_bits: the pattern 'nothing' matches no"),
        ("--weight-bits", "12", "has no 12-bit weights"),
        ("--method", "magic", "unknown quantization method 'magic'"),
        ("--target", "onxruntime", "did you mean 'onnxruntime'"),
        ("--max-drop", "-1", "max_drop: expected a number ≥ 0"),
    ):
        code, _, err = cli(*common, tmp_path / "b.onnx", option, value)
        assert code == 2
        assert message in " ".join(err.split())


def test_ctrl_c_says_that_the_next_run_goes_on(
    cli: Cli, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from slimkit.recipe.stages.training import TrainStage

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(TrainStage, "run", interrupted)
    code, _, err = cli("run", recipe, "--out", tmp_path / "out", "--set", "seed=7")
    assert code == 130
    assert "goes on from here" in err.splitlines()[-1]
    assert not (tmp_path / "out" / "report.json").exists()


def test_a_factory_in_the_current_folder_is_found(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_network.py").write_text(
        "from torch import nn\ndef build(width=4):\n    return nn.Conv2d(3, width, 1)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    code, out, _ = cli("profile", "own_network:build", "--arg", "width=8", "--json")
    assert code == 0
    assert json.loads(out)["params"] == 32


def test_evaluate_prints_a_line_per_metric_of_a_model_and_of_its_file(
    cli: Cli, tmp_path: Path
) -> None:
    model, data = ("slimkit:resnet20", "--arg", "in_channels=1"), ("--data", "digits")
    code, said, _ = cli("evaluate", *model, *data, "--image-size", 8, "--split", "test")
    assert code == 0
    labels = [line.rpartition(" ")[0] for line in said.splitlines()]
    assert labels == ["accuracy", "top-5 accuracy", "loss"]
    network = slimkit.build_model("slimkit:resnet20", in_channels=1).eval()
    slimkit.save(network, tmp_path / "m")
    file = tmp_path / "m.onnx"
    slimkit.export(network, file, torch.zeros(1, 1, 8, 8))
    code, _, _ = cli("evaluate", file, *data, "--image-size", 8, "--split", "val")
    assert code == 0
    for arguments, message in (
        ((*model, "--data", "digts"), "--data: unknown data source 'digts'"),
        ((*model, *data, "--split", "vla"), "--split: there is no split 'vla'"),
        ((*model, *data, "--task", "clasification"), "did you mean 'classification'"),
    ):
        code, _, said = cli("evaluate", *arguments)
        assert code == 2
        assert message in said
    assert "classification" in cli("list", "tasks")[1]


def test_names_from_outside_never_command_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "\x1b]0;title\x07[red]"
    assert main(["report", str(folder)]) == 2
    folder.mkdir()
    (folder / "report.json").write_text(json.dumps({"variants": [{"name": "a\x1b[2J\x9b2J"}]}))
    assert main(["report", str(folder)]) == 0
    assert main(["compare", str(folder), str(folder)]) == 0
    printed = capsys.readouterr()
    for text in (printed.out, printed.err):
        assert not {"\x1b", "\x07", "\x9b"} & set(text)
    assert "a␛[2J" in printed.out
    assert "␛]0;title[red]" in printed.err.replace("\n", "")
    assert "␛]0;title[red]" in printed.out.replace("\n", "")
