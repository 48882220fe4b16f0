"""The service process: an HTTP server beside the loop.

A local service also has a Ray head and an MLflow server of its own.
`maskray serve` runs one in the foreground, `python -m orchestrator.server.service SETTINGS.json` a
local one. Settings come in a file, since a command line can be read by every user of the machine
and a ledger's URL may hold a password.
"""

from __future__ import annotations

import gc
import logging
import math
import os
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as package_version
from pathlib import Path

import uvicorn

from contract.answers import Check, ClusterView, NodeView, Staging
from contract.command import run_command
from contract.machine.proxies import proxy_for
from orchestrator.cluster import staging
from orchestrator.cluster.doctor import examine
from orchestrator.cluster.jobs import Cluster, UnreachableError
from orchestrator.cluster.nodes import Node
from orchestrator.ledger import lease, queries
from orchestrator.ledger import users as auth
from orchestrator.ledger.opening import Ledger, LedgerError, reason
from orchestrator.ledger.retention import keep_storage_small
from orchestrator.local import stack
from orchestrator.local.connect import write_service_record
from orchestrator.local.processes import check_private, own_home, own_token
from orchestrator.local.ray_head import folder_for_sockets
from orchestrator.schedule.decide import Wait
from orchestrator.schedule.measures import Measures
from orchestrator.schedule.reconcile import Reconciler
from orchestrator.server import bookkeeping
from orchestrator.server.api import build_app
from orchestrator.server.front.listener import build_server, listen
from orchestrator.server.front.logins import Logins, set_administrator
from orchestrator.server.mlflow import MLflow, TrackingDownError
from orchestrator.server.pulse import Pulse
from orchestrator.server.reports import Reports
from orchestrator.settings import ServiceSettings, ledger_url

LOG = logging.getLogger("maskray")
_REPORT_S = 5.0  # between two looks for studies whose page is old
_BOOK_S = 2.0  # between two looks at MLflow
_KEEP_S = 3600.0  # between two looks for what may be deleted
_SAME_WARNING_S = 60.0  # between two log entries of one text
_READY_S = 90.0  # for a head that is starting


class SeldomTwice(logging.Filter):
    """Lets a warning through once a minute: the loop tries again, and fails again, every turn."""

    def __init__(self) -> None:
        super().__init__()
        self._said: dict[str, float] = {}  # text -> when it was let through

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno < logging.WARNING:
            return True
        text = f"{record.getMessage()} {record.exc_info[1] if record.exc_info else ''}"
        if record.created - self._said.get(text, 0.0) < _SAME_WARNING_S:
            return False
        # without the old ones: a service runs for months, and texts hold names and numbers
        self._said = {
            said: at for said, at in self._said.items() if record.created - at < _SAME_WARNING_S
        }
        self._said[text] = record.created
        return True


class Service:
    """Its threads: the loop (main), HTTP (uvicorn), books (MLflow, webhooks), looks, reports,
    storage (what may be deleted) and the lease.
    """

    def __init__(
        self, settings: ServiceSettings, ledger: Ledger, holder: str, ray_token: str
    ) -> None:
        self.settings = settings
        self._ray_token = ray_token  # of a cluster that is not local
        self.ledger = ledger
        self.holder = holder
        self.loop = Reconciler(ledger, settings)
        self._ending = threading.Event()
        self._wake = threading.Event()
        self._touched = time.monotonic()
        self._cluster: Cluster | None = None
        self._mlflow: MLflow | None = None
        self._lacks: dict[str, bookkeeping.Lack] = {}  # by trial; the books' thread writes it
        self._logins = Logins(ledger, Path(settings.home)) if settings.mlflow_login_file else None
        self.loop.admission.logins = self._logins
        self._experiments: dict[str, str] = {}  # name -> MLflow's id
        self._asked: set[str] = set()  # names whose id the books' thread looks up
        self._reports = Reports()
        self._introduced = bookkeeping.Introduced()
        self._tracking_uri = "" if settings.mlflow == "local" else settings.mlflow
        # A trial is given the URI also while the server is down: its records go there later.
        self.loop.tracking_uri = self._tracking_uri
        self._hang_timer = stack.HangTimer()
        self._examining = threading.Lock()
        self.pulse = Pulse(ledger, holder)

    # --- what the routes use (api.Hub) ---

    def waits(self) -> Mapping[str, Wait]:
        """Why each waiting trial waits, by the last decision; what the service lacks of others."""
        lacks = {trial: lack.wait for trial, lack in list(self._lacks.items())}
        troubles = self.loop.troubles.words.items()
        odd = {trial: Wait(trial, 0, words) for trial, words in troubles}
        return {**self.loop.admission.waits, **odd, **lacks}

    def nodes(self) -> list[Node]:
        """The cluster as it is; of a local one that starts, what it will have."""
        if self.loop.nodes or self.settings.ray != "local":
            return list(self.loop.nodes)
        total = {"CPU": float(stack.local_cpus(self.settings)), **self.settings.ray_resources}
        # Ray counts the GPUs when it starts: until then a study may ask for any number
        total["GPU"] = float(self.settings.ray_gpus) if self.settings.ray_gpus >= 0 else math.inf
        return [Node("local", total, total)]

    def cluster(self) -> ClusterView:
        nodes = [
            NodeView(id=node.id, total=dict(node.total), free=dict(node.free))
            for node in self.loop.nodes
        ]
        return ClusterView(state=self.loop.cluster_words, nodes=nodes)

    def tracking_uri(self) -> str:
        """Empty while a local MLflow server starts, and without MLflow."""
        return self._tracking_uri

    def experiment_id(self, name: str) -> str:
        if name and name not in self._experiments:
            self._asked.add(name)
        return self._experiments.get(name, "")

    def driver_log(self, submission_id: str) -> str:
        cluster = self._cluster
        try:
            return cluster.log(submission_id) if cluster is not None else ""
        except UnreachableError:
            return ""  # the log is still there once Ray answers again

    def examine(self) -> list[Check]:
        """One examination at a time, once the cluster of this service answers."""
        with self._examining:
            try:
                uri = self.loop.tracking_uri or self._tracking_uri
                return examine(self._ready_cluster(), self.settings, uri, _login_error(uri))
            except UnreachableError as error:
                remedy = "start the head, or correct `ray`"
                return [Check(name="ray", ok=False, found=str(error), remedy=remedy)]

    def stage(self, uris: Sequence[str], cache_gib: float) -> Staging:
        return staging.begin(self._ready_cluster(), self.settings, uris, cache_gib, time.time())

    def staging(self, name: str) -> Staging:
        return staging.look(self._ready_cluster(), name)

    def _ready_cluster(self) -> Cluster:
        """Raises UnreachableError if none answers in time."""
        deadline = time.monotonic() + _READY_S
        while (self._cluster is None or not self.loop.nodes) and time.monotonic() < deadline:
            self._ending.wait(0.2)
        if self._cluster is None:
            raise UnreachableError(
                f"the cluster is not there: {self.loop.cluster_words}; see the service's log"
            )
        return self._cluster

    def measures(self) -> Measures:
        return self.loop.measures

    def touch(self) -> None:
        """A client was here: the service is not idle."""
        self._touched = time.monotonic()

    def wake(self) -> None:
        """The loop takes its next turn now."""
        self._wake.set()

    def end(self) -> None:
        """Asks all threads to end."""
        self._ending.set()
        self._wake.set()

    # --- threads ---

    def run(self, server: uvicorn.Server, listener: socket.socket) -> None:
        """Returns once the service was asked to end, is idle, or lost its ledger."""
        http = threading.Thread(
            target=server.run, kwargs={"sockets": [listener]}, name="http", daemon=True
        )
        books = threading.Thread(target=self._keep_books, name="books", daemon=True)
        looks = threading.Thread(target=self._keep_looks, name="looks", daemon=True)
        reports = threading.Thread(target=self._keep_reports, name="reports", daemon=True)
        # a thread of its own: a store may take minutes to delete
        storage = threading.Thread(target=self._keep_storage, name="storage", daemon=True)
        renewals = threading.Thread(
            target=self.pulse.keep, args=(self._ending,), name="lease", daemon=True
        )
        threads = (http, books, looks, reports, storage, renewals)
        for thread in threads:
            thread.start()
        try:
            while not self._ending.is_set():
                # Before the turn: a request that comes in the turn may come too late for it, and
                # then the wait below ends at once.
                self._wake.clear()
                self._turn()
                self._wake.wait(self.settings.poll_s)
        finally:
            self._ending.set()
            server.should_exit = True
            for thread in threads:
                thread.join(10)

    def _turn(self) -> None:
        try:
            self._ensure_cluster()
            if self._cluster is not None:
                self.loop.tick(self._cluster, time.time())
                self._hang_timer.answered()
        except UnreachableError as error:
            self._note_unreachable(error)
        except LedgerError as error:
            LOG.warning("ledger: %s; tried again", reason(error))
        except OSError as error:
            LOG.warning("storage or network: %s; tried again", error)
        except Exception:
            # Nobody foresaw it, but trials run and people ask for them: the service must go on.
            LOG.exception("a turn of the loop failed; tried again")
        self.pulse.turned()
        if self.settings.idle_minutes and self._idle():
            LOG.info("idle for %g minutes: ends itself", self.settings.idle_minutes)
            self.end()

    def _ensure_cluster(self) -> None:
        if self.settings.ray != "local":
            if self._cluster is None:
                self._cluster = Cluster(self.settings.ray, self._ray_token)
            return
        local = stack.ensure_ray(self.settings)
        if local.started:
            LOG.info(
                "started a Ray head, dashboard %s%s",
                local.child.url,
                ", its predecessor is dead" * local.replaced,
            )
            self._hang_timer.answered()  # a head that starts does not answer for some seconds
            self.loop.cluster_words = "the cluster is starting"
        if self._cluster is None or self._cluster.url != local.child.url:
            if self._cluster is not None:
                self._cluster.close()
            self._cluster = Cluster(local.child.url, own_token(stack.ray_token_file(self.settings)))

    def _note_unreachable(self, error: UnreachableError) -> None:
        if self.loop.cluster_words == "ready":
            # only now, not in each turn until it answers again
            LOG.warning("%s", error)
            self.loop.cluster_words = f"the cluster does not answer: {error}"
        if self.settings.ray == "local" and self._hang_timer.over():
            LOG.warning("the Ray head hangs: ending it")
            stack.end_ray(self.settings)
            self._hang_timer.answered()

    def _keep_books(self) -> None:
        self._keep(self._turn_books, self._turn_logins, self._turn_runs, self._turn_webhooks)

    def _keep_looks(self) -> None:
        # apart from the books: no seed waits for MLflow
        self._keep(self._turn_looks)

    def _turn_looks(self) -> None:
        from orchestrator.server.looks import take_due  # loads scipy, which takes seconds

        if take_due(self.ledger, time.time()):
            self.wake()

    def _keep_storage(self) -> None:
        self._keep(self._turn_storage, pause_s=_KEEP_S)

    def _turn_storage(self) -> None:
        now, days = time.time(), self.settings.keep.copies_days
        freed = keep_storage_small(self.ledger, self.settings, now)
        if days and self._mlflow is not None:
            freed += bookkeeping.remove_copies(self.ledger, self._mlflow, days, now)
        if freed:
            LOG.info("deleted %d bytes that the settings let go; the events say what", freed)

    def _keep(self, *turns: Callable[[], None], pause_s: float = _BOOK_S) -> None:
        while not self._ending.is_set():
            # each in its own `try`: webhooks are sent while MLflow is down, runs end while it has
            # trouble with a login
            for turn in turns:
                try:
                    turn()
                except TrackingDownError as error:
                    LOG.warning("%s", error)
                except (LedgerError, OSError) as error:
                    LOG.warning("books: %s", " ".join(str(error).split())[:500])
                except Exception:
                    LOG.exception("bookkeeping failed; tried again")
            self._ending.wait(pause_s)

    def _turn_books(self) -> None:
        uri = self.settings.mlflow
        if uri == "local":
            local = stack.ensure_mlflow(self.settings)
            if local.started:
                LOG.info("started an MLflow server, %s", local.child.url)
            uri = self._tracking_uri = self.loop.tracking_uri = local.child.url
        if uri and (self._mlflow is None or self._mlflow.uri != uri):
            mlflow = MLflow(uri)
            if not mlflow.ready():
                mlflow.close()
                return
            self.loop.admission.mlflow_trouble = mlflow.complaint()
            if self.loop.admission.mlflow_trouble:
                LOG.warning("%s", self.loop.admission.mlflow_trouble)
                mlflow.close()
                return
            self._mlflow = mlflow
        if self._mlflow is not None:
            bookkeeping.make_parents(self.ledger, self._mlflow, time.time())

    def _turn_logins(self) -> None:
        if self._logins is not None and self._mlflow is not None:
            self._logins.keep(self._mlflow)

    def _turn_runs(self) -> None:
        if self._mlflow is not None:
            ledger, mlflow, now = self.ledger, self._mlflow, time.time()
            while self._asked:
                name = self._asked.pop()
                if (known := mlflow.known_experiment(name)) is not None:
                    self._experiments[name] = known
            self._introduced.live(ledger, mlflow, now)
            bookkeeping.close_runs(
                ledger, mlflow, now, lacks=self._lacks, introduced=self._introduced
            )

    def _keep_reports(self) -> None:
        """A thread of its own: a page takes seconds, the pictures of its last one minutes."""
        while not self._ending.is_set():
            try:
                self._reports.turn(self.ledger, self._mlflow, time.time())
            except (LedgerError, OSError) as error:
                LOG.warning("reports: %s", " ".join(str(error).split())[:500])
            except Exception:
                LOG.exception("a report failed; tried again")
            self._ending.wait(_REPORT_S)

    def _turn_webhooks(self) -> None:
        if self.settings.webhook:
            bookkeeping.send_webhooks(self.ledger, self.settings.webhook)

    def _idle(self) -> bool:
        if time.monotonic() - self._touched < 60 * self.settings.idle_minutes:
            return False
        with self.ledger.reading() as transaction:
            return not queries.anything_to_do(transaction)


def _login_error(uri: str) -> str:
    """Why MLflow does not let the service in; empty if it does, or if there is none."""
    if not uri:
        return ""
    mlflow = MLflow(uri)
    try:
        return mlflow.complaint()
    finally:
        mlflow.close()


def serve(settings: ServiceSettings, first_token: str = "") -> int:
    """Runs a service until it is asked to end.

    first_token: the administrator's, in place of one in a file.
    Raises RuntimeError if the ledger is another's or the port is taken.
    """
    home = Path(settings.home).absolute()
    own_home(home)
    settings = settings.model_copy(update={"home": str(home)})
    for uri in (settings.ray, settings.mlflow, settings.webhook):
        proxy_for(uri)  # refuses a proxy of no use now, and not in a thread later
    if settings.ray == "local":
        folder_for_sockets()  # likewise
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr
    )
    LOG.addFilter(SeldomTwice())
    for noisy in ("httpx", "alembic", "uvicorn.access"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    if settings.mlflow_login_file:
        if settings.mlflow == "local":
            stack.own_login(settings)
        set_administrator(Path(settings.mlflow_login_file))
    ledger = Ledger(ledger_url(settings))
    holder = secrets.token_hex(16)
    lease.take_lease(ledger, holder, time.time())
    try:
        _set_first_admin(ledger, settings, first_token)
        # bound before the service starts anything: a port that is taken must not cost a Ray head
        listener = listen(settings, bool(first_token or settings.token_file))
        path = settings.ray_token_file
        ray_token = (
            Path(path).read_text("utf-8").strip() if path else os.environ.get("RAY_AUTH_TOKEN", "")
        )
        service = Service(settings, ledger, holder, ray_token)
        app = build_app(service, _version(), lambda: service.pulse.health(_version()))
        server = build_server(app, settings)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda _number, _frame: service.end())
        port = listener.getsockname()[1]
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        url = f"http{'s' if settings.tls_certificate else ''}://{host}:{port}"
        LOG.info("listening on %s", url)
        write_service_record(home, url)
        collect_seldom()
        service.run(server, listener)
        if settings.ray == "local":
            stack.end_ray(settings)
        if settings.mlflow == "local":
            stack.end_mlflow(settings)
        (home / "service.json").unlink(missing_ok=True)
    finally:
        lease.drop_lease(ledger, holder)
        ledger.close()
    return 0


def collect_seldom() -> None:
    """Python looks for garbage in cycles after 100,000 new objects; its own number is 700.

    An answer about ten thousand trials is twice as many objects, none of them garbage before the
    end: looking through them took half of its time.
    """
    gc.freeze()  # the modules stay
    gc.set_threshold(100_000, 20, 20)


def _set_first_admin(ledger: Ledger, settings: ServiceSettings, first_token: str) -> None:
    path = Path(settings.token_file) if settings.token_file else Path(settings.home) / "token"
    token = first_token or own_token(path)
    if len(token) < 16:
        where = "MASKRAY_TOKEN" if first_token else str(path)
        raise ValueError(f"{where}: a token has at least 16 characters; take a longer random one")
    if not first_token and settings.token_file:
        check_private(path)
    with ledger.writing() as transaction:
        auth.set_user(transaction, "admin", "admin", token, time.time())


def _version() -> str:
    try:
        return package_version("maskray")
    except PackageNotFoundError:
        return "0+source"


def main() -> None:
    arguments = sys.argv[1:]
    text = Path(arguments[0]).read_text("utf-8")
    sys.exit(run_command(lambda: serve(ServiceSettings.model_validate_json(text)), arguments))


if __name__ == "__main__":
    main()
