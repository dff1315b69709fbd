"""What every program shares: Hydra configuration in; one sentence and exit code 2 where the user is wrong."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from flexirl.errors import UserError
from flexirl.experiments.renamed import check_names_of_settings

_CONF = Path(__file__).resolve().parents[1] / "conf"


def run_program(config_name: str, body: Callable[[DictConfig], object]) -> None:
    """Runs `body` on the configuration `conf/<config_name>.yaml` with the command line's overrides."""
    sys.argv[1:] = [part for argument in sys.argv[1:] for part in _spelled_out(argument)]
    # Hydra then raises what it would print, so that it can be said in a sentence.
    os.environ["HYDRA_FULL_ERROR"] = "1"

    def guarded(config: DictConfig) -> object:
        try:
            return body(config)
        except UserError as error:
            _fail(error)

    try:
        check_names_of_settings(sys.argv[1:])
        hydra.main(version_base="1.3", config_path=str(_CONF), config_name=config_name)(guarded)()
    except (UserError, HydraException, OmegaConfBaseException) as error:
        _fail(error)
    except KeyboardInterrupt:
        sys.exit(130)


def _spelled_out(argument: str) -> list[str]:
    """What Hydra would take for another thing: files in place of a group's choice; `compare=a,b`, which is no sweep."""
    for group, suffix, field in (("engine", ".json", "profile"), ("policy", ".onnx", "name")):
        if argument.startswith(f"{group}=") and argument.endswith(suffix):
            return [f"{group}=file", f"{group}.{field}={argument.removeprefix(f'{group}=')}"]
    if argument.startswith("compare=") and "," in argument:
        return [f"compare='{argument.removeprefix('compare=')}'"]
    return [argument]


def output_folder() -> Path:
    """The run's folder, made by Hydra."""
    return Path(HydraConfig.get().runtime.output_dir)


def _fail(error: Exception) -> NoReturn:
    # Hydra's messages span lines and end in places to look that mean nothing to a user.
    message = re.split("Config search path:|See https:", str(error))[0]
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)
