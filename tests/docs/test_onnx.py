"""The script on the page about ONNX, in a Python that imports nothing of infc."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import infc

ROOT = Path(__file__).resolve().parents[2]
TEXT = "def fibonacci(n):"
TOKENS = 16


def test_the_exported_model_writes_the_same_tokens_without_infc(tmp_path: Path) -> None:
    page = (ROOT / "docs/onnx.md").read_text()
    (script,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert f'python write.py tiny-onnx.infc "{TEXT}" {TOKENS}' in page
    assert "infc" not in script and len(script.splitlines()) <= 25
    overrides = ["backend=onnx", "onnx.whole_sequence=true"]
    artifact = infc.compile(
        ROOT / "recipes/tiny/model.yaml", output=tmp_path / "art", overrides=overrides, verify=False
    )
    check = "\nassert not any(name.split('.')[0] == 'infc' for name in sys.modules)\n"
    (tmp_path / "write.py").write_text(script + check)

    def run(text: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "write.py", str(artifact.path), text, str(TOKENS)]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)

    assert run("").stderr == "the text has no tokens\n"
    ran = run(TEXT)
    with infc.LLM(artifact) as llm:
        params = infc.SamplingParams(max_tokens=TOKENS, temperature=0, ignore_eos=True)
        (output,) = llm.generate(TEXT, params)
    assert ran.stdout.rstrip("\n") == output.outputs[0].text.rstrip("\n")
