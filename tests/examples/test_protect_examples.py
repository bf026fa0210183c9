"""The examples that protect a model do not overwrite what an earlier run has left."""

from __future__ import annotations

import sys

import protect_classifier
import protect_unet
import pytest


@pytest.mark.parametrize("example", [protect_classifier, protect_unet])
def test_a_second_run_into_the_same_folder_ends_in_one_line(example, tmp_path, monkeypatch):
    (tmp_path / "config.json").touch()
    monkeypatch.setattr(sys, "argv", ["example", "--output_dir", str(tmp_path)])
    message = rf"^{tmp_path} holds an earlier run: delete it, or choose another --output_dir\.$"
    with pytest.raises(SystemExit, match=message):
        example.main()
