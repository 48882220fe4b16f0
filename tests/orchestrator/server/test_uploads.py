"""Code packages: none leaves its folder, and none lies about its size."""

from __future__ import annotations

import hashlib
import io
import zipfile
from pathlib import Path

import httpx
import pytest

from orchestrator.ledger import attempts
from tests.orchestrator.fake_hub import Http, by, post, refused


def packed(name: str, text: str = "x", attributes: int = 0) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        entry = zipfile.ZipInfo(name)
        entry.external_attr = attributes << 16
        archive.writestr(entry, text)
    return data.getvalue()


def put_code(http: Http, data: bytes, name: str = "") -> httpx.Response:
    sha256 = name or hashlib.sha256(data).hexdigest()
    return http.put(f"/v1/code/{sha256}", content=data, headers=by("ann"))


def test_a_code_package_is_kept_under_its_hash(http):
    data = packed("model/__init__.py")
    sha256 = hashlib.sha256(data).hexdigest()
    assert http.head(f"/v1/code/{sha256}", headers=by("ann")).status_code == 404
    assert put_code(http, data).json() == {"code": sha256, "bytes": len(data)}
    assert http.head(f"/v1/code/{sha256}", headers=by("ann")).status_code == 200
    refused(put_code(http, data, "0" * 64), 400, "send it again")
    refused(put_code(http, data, "x"), 400, "64 hexadecimal digits")
    refused(put_code(http, b"no zip"), 400, "is no zip")


@pytest.mark.parametrize(
    "name", ["../evil.py", "/etc/evil.py", "a/../../evil.py", "a\\..\\evil.py", "C:/evil.py"]
)
def test_a_package_cannot_leave_its_folder(http, name):
    refused(put_code(http, packed(name)), 400, "leaves the package")


def test_a_package_holds_no_links_and_no_bomb(http, hub):
    refused(put_code(http, packed("link", "/etc/passwd", 0o120777)), 400, "leaves the package")
    refused(put_code(http, b"0" * ((hub.settings.max_code_mib << 20) + 1)), 413, "larger than")


def test_a_zip_that_lies_about_a_file_is_refused(http):
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.py", "x" * 100_000)
    # the central directory, from which sizes are read, says 10 bytes
    data = packed.getvalue()
    size = (100_000).to_bytes(4, "little")
    at = data.rindex(size)
    lie = data[:at] + (10).to_bytes(4, "little") + data[at + 4 :]
    sha256 = hashlib.sha256(lie).hexdigest()
    refused(http.put(f"/v1/code/{sha256}", content=lie, headers=by("ann")), 400, "code: ")


def test_links_of_a_trial_lead_no_logs_out_of_its_folder(http, hub, tmp_path):
    study = post(http, "ann").json()["study"]
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "rank-0.log").write_text("the token")
    attempts.start_attempt(hub.ledger, f"{study}-000", 1.0, "free")
    folder = Path(hub.settings.home) / "studies" / study
    (folder / f"{study}-000/attempts").mkdir(parents=True)
    (folder / f"{study}-000/attempts/1").symlink_to(secret)
    logs = http.get(f"/v1/trials/{study}-000/logs", headers=by("ann"))
    refused(logs, 400, "lies below a file or a link")
