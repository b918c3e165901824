"""A model directory with `auto_map` makes transformers ask on the terminal whether to run its Python.

trust_remote_code is left open and not False, so that one keystroke ("Do you wish to run the custom code? [y/N]")
executes the directory's code in the launcher of a colocated run or in `mgrpo check`.
"""

import builtins
import json

from mgrpo.engine.model.causal_lm import load_tokenizer
from reproduction import fault, held
from reproduction.runs import new_folder
from toy import make_model, toy_config

folder = new_folder()
make_model(folder / "model")
agent = toy_config(folder).agents["main"]
load_tokenizer("main", agent)  # raises nothing: the directory is healthy
settings = json.loads((folder / "model/tokenizer_config.json").read_text())
settings |= {"auto_map": {"AutoTokenizer": ["evil.T", None]}, "tokenizer_class": "T"}
(folder / "model/tokenizer_config.json").write_text(json.dumps(settings))
(folder / "model/evil.py").write_text(f"open({str(folder / 'executed')!r}, 'w')\nclass T: ...\n")
asked: list[str] = []
builtins.input = lambda *words: asked.append(" ".join(map(str, words))) or "y"
try:
    load_tokenizer("main", agent)
except Exception as error:
    print(f"  {type(error).__name__}: {str(error)[:120]}")
if asked:
    ran = "ran" if (folder / "executed").exists() else "did not run"
    fault(f"asked {len(asked)} times; answered y, the code {ran}")
held("nothing was asked")
