"""`python -m mgrpo.engine` is the `mgrpo` command, for launchers. It ends when its launcher does."""

from __future__ import annotations

from mgrpo.engine.system import secrets
from mgrpo.engine.system.process import die_with_launcher

die_with_launcher()  # before what takes seconds to import
secrets.take()

from mgrpo.engine.cli.main import main  # noqa: E402

main()
