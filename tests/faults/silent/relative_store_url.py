"""--resume from another directory begins a second, empty store beside the old checkpoints.

A relative sqlite:/// store.url is relative to the directory of each command; every other path of the config is made
absolute.
"""

import sqlite3

from reproduction import cannot, fault, held
from reproduction.runs import mgrpo, new_folder, raw, write

folder = new_folder()
for name in "xy":
    (folder / name).mkdir()
config = write(folder, raw(folder, store={"url": "sqlite:///store.db"}, steps=3))
status, said = mgrpo("train", config, cwd=folder / "x")
if status != 0:
    cannot(said[-500:])
status, said = mgrpo("train", config, "--resume", "--set", "steps=5", "--set", "restarts=0", cwd=folder / "y")
if not (folder / "y/store.db").exists():
    held(f"status {status}: {said[-300:]}")
with sqlite3.connect(folder / "y/store.db") as db:
    queries = db.execute("select count(*), min(query), max(query) from queries").fetchone()
fault(f"a second store in the other directory: {queries} (count, first, last query); status {status}: {said[-500:]}")
