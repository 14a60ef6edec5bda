"""What commands and functions say, as records of the logger saml_rec."""

import logging

import pytest
from rich.console import Console

import saml_kernels
import saml_rec as package
from saml_rec.cli.options import warn
from saml_rec.console import say


def test_version_is_the_kernels():
    assert package.__version__ == saml_kernels.__version__
    assert isinstance(package.__version__, str)


def test_training_logs_what_it_prints(saml_rec, small_dataset, tmp_path, caplog):
    given = ("--data", small_dataset.data, "--schema", small_dataset.schema, "--out", tmp_path / "run")
    with caplog.at_level(logging.INFO, logger="saml_rec"):
        result = saml_rec("train", *given, "--model", "mlp", "--epochs", 2, "--hidden-dims", "4")
    assert result.exit_code == 0, result.output
    lines = [record.getMessage() for record in caplog.records if record.name == "saml_rec"]
    assert [line[:9] for line in lines if line.startswith("epoch")] == ["epoch 1/2", "epoch 2/2"]
    assert all(line in result.stdout.splitlines() for line in lines)


def test_a_function_without_a_console_logs(caplog, capsys):
    with caplog.at_level(logging.INFO, logger="saml_rec"):
        say(None, "100 % [red]done")
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [("INFO", "100 % [red]done")]
    assert capsys.readouterr() == ("", "")


def test_a_console_prints_once(caplog, capsys):
    with caplog.at_level(logging.INFO):
        say(Console(), "a line")
    assert capsys.readouterr().out == "a line\n"


def test_warnings_are_records_and_are_printed_once(caplog, capsys):
    warn("rows are missing")
    assert capsys.readouterr() == ("", "warning: rows are missing\n")
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [("WARNING", "rows are missing")]


@pytest.mark.parametrize("level", ["INFO", "WARNING"])
def test_silent_until_somebody_listens(python, level):
    program = f"import logging; from saml_rec.console import LOGGER; LOGGER.log(logging.{level}, 'a line')"
    result = python("-c", program)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
