"""`mgrpo rollout FILE --name ../../x` makes folders and files outside the run directory before it refuses the name."""

from reproduction import cannot, fault, held
from reproduction.runs import check_healthy_run, mgrpo, new_folder, raw, write

check_healthy_run()
folder = new_folder()
store = {"url": f"sqlite:///{folder}/store.db"}
config = write(folder, raw(folder, topology="cluster", run_dir=str(folder / "a/b/run"), store=store))
status, said = mgrpo("store", "init", config)
if status != 0:
    cannot(said)
status, said = mgrpo("rollout", config, "--name", "../../../../escaped")
outside = folder / "escaped"
if outside.exists():
    files = [str(path.relative_to(folder)) for path in outside.rglob("*")]
    fault(f"status {status}, {said.strip()[-200:]}; made outside of run_dir: escaped/ {files}")
if status in (0, None):
    cannot(f"the name was not refused: status {status}: {said[-300:]}")
held(f"status {status}: {said.strip()[-200:]}")
