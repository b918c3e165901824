"""64 workers need more connections than PostgreSQL takes by default (max_connections = 100).

Each process keeps two connections open (its loop's and its heartbeat's), 128 in all. A worker that gets none ends at
once with status 1, as opening the store is not tried again; in topology local that goes on until the restarts are used
up and the whole run is given up.
"""

import threading

from mgrpo.bench.postgres import PASSWORD, Cluster, why_not
from mgrpo.engine.store import Publication, Store
from reproduction import cannot, fault, held

if reason := why_not():
    cannot(reason)
failed: list[tuple[int, str]] = []


def use(store: Store, number: int) -> None:
    """Use two connections of a worker's store at once, as its loop and its heartbeat do."""
    both = threading.Barrier(2)

    def beat() -> None:
        both.wait()
        try:
            store.queries.extend(f"w{number}", 60)
        except OSError as error:
            failed.append((number, str(error)[-60:]))

    thread = threading.Thread(target=beat)
    thread.start()
    with store.database.engine.connect():
        both.wait()
        thread.join()


server = Cluster()
try:
    url = server.create()
    first = Store(url, "run", password=PASSWORD)
    first.roles.begin_run(["main"], 2, "f")
    first.roles.hold("trainer:main", "h", 600)
    first.roles.publish(Publication(agent="main", step=0, version=0, trained=0, file="x", checksum="c", size=1), "h")
    stores = [first]
    use(first, 0)
    if failed:
        cannot(f"one worker alone was refused: {failed}")
    for number in range(1, 64):  # an object each, which has a pool of connections of its own, as a process has
        try:
            stores.append(Store(url, "run", password=PASSWORD))
            use(stores[-1], number)
        except OSError as error:
            failed.append((number, str(error)[-60:]))
    for store in stores:
        store.close()
finally:
    server.remove()
if failed:
    fault(f"{len(failed)} refusals, the first for worker {failed[0][0]} of 64: {failed[0][1]}")
held("64 workers were served")
