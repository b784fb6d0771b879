"""A config folder from elsewhere, with a ``hydra`` part that would run code of its choice."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from qtrain import cli
from qtrain.hydra_section import check_hydra, is_typed
from qtrain.overrides import UserError

Toy = Callable[..., tuple[int, str]]


def checked(text: str, allowed: tuple[str, ...] = (), overrides: tuple[str, ...] = ()) -> None:
    check_hydra(OmegaConf.create(text), allowed, overrides)


@pytest.fixture
def foreign(toy: Toy, tmp_path: Path) -> Callable[..., tuple[int, str]]:
    """foreign(text, *arguments): runs the toy with an option ``+evil=e`` that holds ``text``, where ``MADE`` is a folder
    that must not appear -> (exit code, everything printed)."""

    def call(text: str, *arguments: str) -> tuple[int, str]:
        made = tmp_path / "made"
        folder = tmp_path / "configs" / "evil"
        folder.mkdir(exist_ok=True)
        (folder / "e.yaml").write_text("# @package _global_\n" + text.replace("MADE", str(made)))
        code, printed = toy("+evil=e", *arguments)
        assert not made.exists()
        assert not Path("runs.txt").exists() or code == 0
        return code, printed

    return call


MKDIR = "{_target_: os.mkdir, path: MADE}"
FILE = "class: logging.FileHandler, filename: "


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (f"hydra: {{callbacks: {{x: {MKDIR}}}}}", "hydra.callbacks.x._target_=os.mkdir"),
        # Mappings that only appear when Hydra resolves them
        ("hydra: {callbacks: {x: '${oc.create:\"{_target_: os.mkdir, path: MADE}\"}'}}", "hydra.callbacks.x=${oc."),
        ("hydra: {callbacks: '${oc.create:\"{x: {_target_: os.mkdir, path: MADE}}\"}'}", "hydra.callbacks=${oc."),
        ("hydra: {callbacks: {x: '${hydra.help.x}'}}", "hydra.callbacks.x=${hydra.help.x}"),
        ("hydra: {callbacks: {x: {_target_: 'hydra.${hydra.job.name}', path: MADE}}}", "hydra.callbacks.x._target_"),
        # The prefix is Hydra's, the code is not
        ("hydra: {callbacks: {x: {_target_: hydra.core.utils.os.mkdir, path: MADE}}}", "hydra.core.utils.os.mkdir"),
        ("hydra: {callbacks: {x: {_target_: hydra.utils.call, config: 3}}}", "hydra.utils.call"),
        ("hydra: {callbacks: {x: {_target_: hydra.experimental.callbacks.Path.touch}}}", "callbacks.Path.touch"),
        # Below launcher and sweeper anything is built as well
        (f"hydra: {{sweeper: {{params: {{size: {MKDIR}}}}}}}", "os.mkdir"),
        ("hydra: {launcher: {_target_: os.mkdir}}", "hydra.launcher._target_=os.mkdir"),
        # Factories, objects, attributes and files of logging
        ("hydra: {job_logging: {formatters: {f: {(): os.mkdir, path: MADE}}}}", "formatters.f.()=os.mkdir"),
        ("hydra: {job_logging: {handlers: {console: {(): os.mkdir, path: MADE}}}}", "handlers.console.()=os.mkdir"),
        ("hydra: {job_logging: {handlers: {console: {class: os.mkdir}}}}", "handlers.console.class=os.mkdir"),
        ("hydra: {job_logging: {handlers: {c: {class: logging.handlers.HTTPHandler}}}}", "c.class=logging.handlers."),
        ("hydra: {job_logging: {handlers: {console: {stream: 'ext://this.s'}}}}", "console.stream=ext://this.s"),
        ("hydra: {job_logging: {handlers: {console: {stream: 'ext:${hydra.job.name}'}}}}", "console.stream=ext:${"),
        ("hydra: {job_logging: {handlers: {console: {.: {baseFilename: MADE}}}}}", "console...baseFilename="),
        (f"hydra: {{job_logging: {{handlers: {{f: {{{FILE}MADE}}}}}}}}", "f.filename="),
        (f"hydra: {{job_logging: {{handlers: {{f: {{{FILE}'${{hydra.runtime.output_dir}}/.bashrc'}}}}}}}}", "f.filename="),
        (
            f"hydra: {{job_logging: {{handlers: {{f: {{{FILE}'${{hydra.runtime.output_dir}}/../x.log'}}}}}}}}",
            "f.filename=",
        ),
        ("hydra: {hydra_logging: {formatters: {f: {(): os.mkdir, path: MADE}}}}", "hydra_logging.formatters.f.()="),
        # A key sent elsewhere, a library loaded first
        ("hydra: {job: {env_set: {WANDB_BASE_URL: 'https://elsewhere'}}}", "may not set the environment"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("multirun", [[], ["-m", "size=1,2"]], ids=["run", "sweep"])
def test_a_foreign_config_builds_nothing_of_its_choice(foreign, text, said, multirun):
    code, printed = foreign(text, *multirun)
    assert code == 2, printed
    assert said in printed
    assert len(printed.splitlines()) == 1


@pytest.mark.parametrize(
    "text",
    [
        "hydra: {callbacks: {x: {_target_: hydra.experimental.callbacks.LogJobReturnCallback}}}",
        "hydra: {job_logging: {root: {level: WARNING}}, hydra_logging: {disable_existing_loggers: true}}",
        "hydra: {sweep: {dir: 'a/${hydra.job.name}/${now:%H}'}, run: {dir: .}}",
    ],
)
def test_what_hydra_offers_stays_possible(foreign, text):
    code, printed = foreign(text)
    assert code == 0, printed


def test_hydra_s_own_logging_passes(toy: Toy) -> None:
    for option in ("default", "none", "disabled"):
        assert toy(f"hydra/job_logging={option}", f"hydra/hydra_logging={option}")[0] == 0
    assert Path("toy.log").is_file()


def test_the_user_may_set_the_environment_and_trust_a_package(toy: Toy) -> None:
    assert toy("+hydra.job.env_set.QTRAIN_X=1")[0] == 0
    checked("callbacks: {x: {_target_: mine.Callback}}", allowed=("mine",))
    with pytest.raises(UserError, match="--allow-target mined"):
        checked("callbacks: {x: {_target_: mined.Callback}}", allowed=("mine",))
    checked("job_logging: {formatters: {f: {(): colorlog.ColoredFormatter}}}", allowed=("colorlog",))
    with pytest.raises(
        UserError, match=r"allowed are logging\.FileHandler, logging\.Formatter, .*--allow-target"
    ):
        checked("job_logging: {formatters: {f: {(): colorlog.ColoredFormatter}}}")


def test_below_launcher_and_sweeper_too():
    """Those of plug-ins take arguments of any kind; Hydra builds what has a target among them."""
    for text, key in (
        ("launcher: {x: {_target_: os.mkdir}}", "hydra.launcher.x._target_=os.mkdir"),
        ("sweeper: {x: [{_target_: hydra_plugins.a.B}]}", r"hydra.sweeper.x\[0\]._target_=hydra_plugins.a.B"),
        ("sweeper: {params: {size: {_target_: os.mkdir}}}", "hydra.sweeper.params.size._target_=os.mkdir"),
        ("launcher: {x: '${a}'}", r"hydra.launcher.x=\${a}"),
        ("sweeper: '${a}'", r"hydra.sweeper=\${a}"),
    ):
        with pytest.raises(UserError, match=key):
            checked(text)


def test_the_names_of_registered_launchers_are_hydra_s_to_check():
    checked(
        "launcher: {_target_: hydra_plugins.hydra_joblib_launcher.joblib_launcher.JoblibLauncher, n_jobs: 2}"
    )
    checked("launcher: {_target_: hydra._internal.core_plugins.basic_launcher.BasicLauncher}")
    checked("launcher: {folder: '${hydra.sweep.dir}/.submitit/%j', name: '${hydra.job.name}'}")
    for target in ("hydra_plugins_x.L", "hydra.utils.instantiate", "hydra_plugins"):
        with pytest.raises(UserError, match=rf"hydra\.sweeper\._target_={target}: "):
            checked(f"sweeper: {{_target_: {target}}}")


@pytest.mark.parametrize(
    ("override", "typed"),
    [
        ("hydra.job.env_set.A=1", True),
        ("+hydra.job.env_set.A=1", True),
        ("++hydra.job.env_set={A: 1}", True),
        ("hydra.job.env_settings=1", False),
        ("x=hydra.job.env_set", False),
        ("hydra.job.name=x", False),
    ],
)
def test_what_the_user_typed(override, typed):
    assert is_typed("hydra.job.env_set", ["size=1", override]) == typed


def test_a_target_that_changes_after_it_was_checked(foreign):
    """A harmless name while it is checked, another when the run begins."""
    calls = []

    def turned() -> str:
        calls.append(1)
        return "qtrain.optim.AdamW" if len(calls) < 20 else "os.mkdir"

    OmegaConf.register_new_resolver("turned", turned, replace=True)
    reached = []

    def resolutions() -> int:
        before = len(calls)
        code, _ = foreign("nested: {_target_: '${turned:}'}")
        reached.append(code)
        return len(calls) - before

    assert resolutions() < 20
    assert reached == [0]
    Path("runs.txt").unlink()
    seen = set()
    for first_bad in range(2, 20):
        calls[:] = [1] * (20 - first_bad)
        code, printed = foreign("nested: {_target_: '${turned:}'}")
        Path("runs.txt").unlink(missing_ok=True)
        seen.add((code, "os.mkdir" in printed))
    assert seen <= {(0, False), (2, True), (1, True)}
    assert (1, True) in seen  # refused when the run began, after the first check had passed


def test_search_paths_import_nothing(toy: Toy, tmp_path: Path) -> None:
    package = tmp_path / "evil_package"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit('imported')")
    primary = tmp_path / "configs" / "toy.yaml"
    before = primary.read_text()
    for path in ("pkg://evil_package", "${oc.env:HOME}", "other://x"):
        primary.write_text(before + f"hydra: {{searchpath: ['{path}']}}\n")
        for arguments in ([], ["--cfg"], ["--help"], ["-m", "size=1,2"]):
            code, printed = toy(*arguments)
            assert code == 2, printed
            assert f"hydra.searchpath={path}: a config may add folders only" in printed
    assert "evil_package" not in sys.modules


def test_what_is_trusted_is_said_on_the_command_line(tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    text = (cli.config_dir() / "evaluate.yaml").read_text()
    assert "allow_targets: []" in text
    (tmp_path / "configs" / "evaluate.yaml").write_text(
        text.replace("allow_targets: []", "allow_targets: [os]")
    )
    assert cli.main(["evaluate", "--config-dir", "configs", "run=nowhere"]) == 2
    assert "allow_targets: what is trusted is said on the command line" in capfd.readouterr().err
    assert cli.main(["evaluate", "--config-dir", "configs", "run=nowhere", "allow_targets=[os]"]) == 2
    assert "nowhere is no checkpoint" in capfd.readouterr().err
