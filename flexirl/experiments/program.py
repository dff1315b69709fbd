"""What every program shares: Hydra configuration in; one sentence and exit code 2 where the user is wrong.

A program's body is a module of `flexirl.programs`, which takes libraries that are slow to import. It is imported once
the configuration is composed and its plain values are checked, so that nobody waits to be told of a mistyped word.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
from pathlib import Path
from types import ModuleType

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from flexirl.errors import UserError
from flexirl.experiments.help import help_text
from flexirl.experiments.overrides import spelled_out
from flexirl.experiments.records import kept_in, remove_if_bare
from flexirl.experiments.renamed import check_names_of_settings
from flexirl.experiments.values import CONF, check_values

_EXTRAS = {"serve": "serve", "run_batch": "serve", "load": "serve"}  # of programs that take what others do not


def run_program(name: str, config_name: str | None = None) -> None:
    """Runs `flexirl.programs.<name>` on its configuration with the command line's overrides.

    config_name: of its file in `conf`, where it has another name than the program.
    """
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(help_text(name, config_name or name))
        return
    sweep = any(argument in ("-m", "--multirun") for argument in sys.argv)
    sys.argv[1:] = [part for argument in sys.argv[1:] for part in spelled_out(argument, sweep)]
    # Hydra then raises what it would print, so that it can be said in a sentence.
    os.environ["HYDRA_FULL_ERROR"] = "1"

    failed: list[str] = []  # a sweep goes on without the jobs that did

    def guarded(config: DictConfig) -> object:
        try:
            check_values(config)
            body = _body(name)
            if config.get("progress", True):
                importlib.import_module("flexirl.experiments.compiling").tell()  # takes Numba, as the body does
            with kept_in(output_folder() / f"{name}.log"):
                return body.run(config)
        except (UserError, HydraException, OmegaConfBaseException) as error:
            failed.append((_place() if sweep else "") + _sentence(error))
            if not sweep:
                remove_if_bare(output_folder())
            return None

    try:
        check_names_of_settings(sys.argv[1:])
        hydra.main(version_base="1.3", config_path=str(CONF), config_name=config_name or name)(guarded)()
    except (UserError, HydraException, OmegaConfBaseException) as error:
        failed.append(_sentence(error))
    except OSError as error:  # of the run's folder, most often
        if error.filename is None:
            raise
        failed.append(f"{error.filename} cannot be used ({error.strerror}); choose another place, as hydra.run.dir=.")
    except KeyboardInterrupt as interrupt:  # whose words, if any, say how to go on
        print("; ".join(["interrupted", *map(str, interrupt.args)]), file=sys.stderr)
        sys.exit(130)
    finally:
        for sentence in failed:
            print(f"error: {sentence}", file=sys.stderr)
    if failed:
        sys.exit(2)


def _body(name: str) -> ModuleType:
    try:
        return importlib.import_module(f"flexirl.programs.{name}")
    except ModuleNotFoundError as error:
        if name not in _EXTRAS or str(error.name).startswith("flexirl"):
            raise
        raise UserError(f"{error.name} is not installed; pip install 'flexirl[{_EXTRAS[name]}]'.") from None


def output_folder() -> Path:
    """The run's folder, made by Hydra."""
    return Path(HydraConfig.get().runtime.output_dir)


def _place() -> str:
    job = HydraConfig.get()
    return f"job {job.job.num} ({' '.join(job.overrides.task)}) failed: "


def _sentence(error: Exception) -> str:
    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key} is missing; give it as {error.full_key}=..."
    # Hydra's messages span lines and end in places to look that mean nothing to a user.
    message = re.split("Config search path:|See https:", str(error))[0]
    return " ".join(message.split())
