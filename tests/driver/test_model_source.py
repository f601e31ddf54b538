"""What the hub refuses, in one line that says what to do."""

import re
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants, errors

from infc.driver.model_source import find_model
from infc.driver.recipe import Recipe
from infc.ir.errors import CheckpointError


def refused(kind: type[Exception]) -> Exception:
    """An error of the hub's client without the response that it came with."""
    error = kind.__new__(kind)
    error.args = ("x",)
    return error


@pytest.mark.parametrize(
    ("error", "offline", "message"),
    [
        (
            refused(errors.GatedRepoError),
            False,
            "access must be granted first (ask for it at https://huggingface.co/org/name, and set",
        ),
        (refused(errors.RevisionNotFoundError), False, "it has no revision 'v2'"),
        (refused(errors.RepositoryNotFoundError), False, "no such model, or a priv"),
        (
            errors.LocalEntryNotFoundError("Cannot find"),
            True,
            "it is not in the cache, and HF_HUB_OFFLINE is set (unset it to download the model)",
        ),
        (
            errors.LocalEntryNotFoundError("Name or service not known\nmore"),
            False,
            "Name or service not known (check the network, the name and HF_TOKEN)",
        ),
        (TimeoutError(), False, "TimeoutError (check the network"),
    ],
)
def test_a_download_that_fails(
    error: Exception,
    offline: bool,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: Any, **options: Any) -> str:
        assert options["revision"] == "v2"
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    recipe = Recipe(model="org/name", revision="v2")
    expected = f"the hub does not provide 'org/name': {message}"
    with pytest.raises(CheckpointError, match=re.escape(expected)):
        find_model(recipe, tmp_path)
