"""Type checkers see the package: a user's slips are errors where they are, and there are none without them."""

import re
import subprocess
import sys

import pytest

pytest.importorskip("mypy")

SCRIPT = """\
import torch
import sculpt
cats, outdoors = (sculpt.load(folder) for folder in ("cats", "outdoors"))
classifier = sculpt.fit([cats, outdoors], checkpoint="cats-outdoors")
both = sculpt.harmonic_mean(cats, outdoors, odds=0.3)
samples = both.sample(16, classifier, steps=32, generator=torch.Generator().manual_seed(0))
only = (cats - outdoors).sample(16, sculpt.Guided(classifier, correct=True))
last = [progress.step for progress in (cats & outdoors).run(16, sculpt.Tracked(particles=64), steps=8)][-1]
unet = (cats & outdoors).as_unet(classifier)
print(samples.verdict.level, only[:4].x.shape, len(sculpt.Samples.cat([samples, only])), last, unet.config)
"""
SLIPS = {
    5: ("odds=0.3", "odd=0.3", 'Unexpected keyword argument "odd"'),
    6: ("both.sample", "both.smaple", 'no attribute "smaple"'),
    7: ("sample(16", 'sample("16"', 'incompatible type "str"; expected "int"'),
    8: ("steps=8", "stpes=8", 'Unexpected keyword argument "stpes"'),
}


def checked(script, folder):
    """Line and message of every error that mypy --strict finds."""
    (folder / "script.py").write_text(script)
    # What these libraries are is no business of the script's, and reading them takes minutes.
    (folder / "mypy.ini").write_text(
        "[mypy]\nstrict = True\n[mypy-diffusers.*,transformers.*,gfn.*,rdkit.*,matplotlib.*]\nfollow_imports = skip\n"
    )
    command = [sys.executable, "-m", "mypy", "--no-pretty", "--cache-dir", str(folder / "cache"), "script.py"]
    said = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    return {int(line): text for line, text in re.findall(r"^script\.py:(\d+): error: (.*)$", said.stdout, re.M)}, said.stdout


def test_four_slips_are_four_errors_at_their_lines_and_there_are_none_without(tmp_path):
    found, said = checked(SCRIPT, tmp_path)
    assert not found and "no issues found" in said, said
    script = SCRIPT
    for right, wrong, _ in SLIPS.values():
        assert script.count(right) == 1
        script = script.replace(right, wrong)
    found, said = checked(script, tmp_path)
    assert found.keys() == SLIPS.keys(), said
    for line, (_, _, message) in SLIPS.items():
        assert message in found[line]
