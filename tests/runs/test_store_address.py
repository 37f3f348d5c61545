"""A store's URI, shown without its password."""

import re
import subprocess
import sys
from urllib.parse import quote

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from kdpipe.runs.store_address import check_uri, describe_error
from kdpipe.settings.credentials import server_address, without_password, without_passwords

PRINTABLE = st.characters(exclude_categories=["C", "Z"])
HOST_PARTS = st.sampled_from(["host", "host:5000", "10.0.0.1:80", "[::1]:5000", "a.b-c.example"])
DATABASES = st.sampled_from(["postgresql", "postgresql+psycopg", "mysql+pymysql", "mssql+pyodbc"])
SCHEMES = st.sampled_from(["http", "https"])
MARK = "s3cret"  # as it stands nowhere else in a URI
PASSWORDS = st.builds(lambda before, after: before + MARK + after, st.text(PRINTABLE), st.text(PRINTABLE))


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("postgresql+psycopg://user:s3/cr:et@host/db", "postgresql+psycopg://user:PASSWORD@host/db"),
        ("postgresql://user:p@ss@host/db", "postgresql://user:PASSWORD@host/db"),
        ("postgresql://user:a@b/c@host/db?port=1", "postgresql://user:PASSWORD@host/db?port=1"),
        ("postgresql://user:a b?password=@c@host/db", "postgresql://user:PASSWORD"),  # rather too much than too little
        ("postgresql://h/db?user=me&password=s3cret&port=1", "postgresql://h/db?user=me&password=PASSWORD&port=1"),
        ("postgresql://h/db?sslpassword=a@b&p%61sswd=c", "postgresql://h/db?sslpassword=PASSWORD&p%61sswd=PASSWORD"),
        ("mssql+pyodbc:///?odbc_connect=UID%3Dme%3BPWD%3Ds3cret", "mssql+pyodbc:///?odbc_connect=PASSWORD"),
        ("http://me:s3cret@host:5000/x@y", "http://me:PASSWORD@y"),
        ("http://me:a/b@host:5000", "http://me:PASSWORD@host:5000"),
        ("http://host:5000", "http://host:5000"),
        ("http://host:5000/x@y", "http://host:5000/x@y"),
        ("http://[::1]:5000/x@y", "http://[::1]:5000/x@y"),
        ("http://me@host:5000/x@y", "http://me@host:5000/x@y"),
        ("sqlite:////tmp/a@b/mlflow.db", "sqlite:////tmp/a@b/mlflow.db"),
        ("sqlite:///C:\\a@b\\mlflow.db", "sqlite:///C:\\a@b\\mlflow.db"),
    ],
)
def test_passwords_are_hidden_and_the_rest_is_shown(text: str, shown: str) -> None:
    assert without_password(text) == shown
    if " " not in text:
        assert without_passwords(f"error in '{text} and {text}") == f"error in '{shown} and {shown}"


@settings(deadline=None)
@given(DATABASES, PASSWORDS, HOST_PARTS)
@example("postgresql", f"a@b:{MARK}/@", "host")
def test_no_part_of_a_database_password_is_shown(scheme: str, password: str, host: str) -> None:
    uri = f"{scheme}://me:{password}@{host}/mlflow?sslmode=require"
    shown = f"{scheme}://me:PASSWORD@{host}/mlflow?sslmode=require"
    assert without_password(uri) == shown
    assert without_passwords(f'could not connect to "{uri}" (x)') == f'could not connect to "{shown}" (x)'


@settings(deadline=None)
@given(SCHEMES, PASSWORDS, HOST_PARTS)
def test_no_part_of_a_server_password_is_shown(scheme: str, password: str, host: str) -> None:
    assume(not re.match(r"\d*[/?#]", password))  # that is a port and a path
    shown = f"{scheme}://me:PASSWORD@{host}/mlflow"
    assert without_password(f"{scheme}://me:{password}@{host}/mlflow") == shown
    assert without_password(f"{scheme}://me:{quote(password, safe='')}@{host}/mlflow") == shown


@settings(deadline=None)
@given(st.one_of(DATABASES, SCHEMES), st.sampled_from(["password", "sslpassword", "passwd", "PWD"]), PASSWORDS)
def test_no_password_in_a_query_is_shown(scheme: str, name: str, password: str) -> None:
    uri = f"{scheme}://host/mlflow?user=me&{name}={quote(password)}&port=1"
    assert without_password(uri) == f"{scheme}://host/mlflow?user=me&{name}=PASSWORD&port=1"


@settings(deadline=None)
@given(st.one_of(DATABASES, SCHEMES, st.just("sqlite")), st.sampled_from(["", "me@"]), HOST_PARTS, st.text(PRINTABLE))
def test_a_uri_without_a_password_is_shown_as_it_is(scheme: str, user: str, host: str, path: str) -> None:
    if scheme not in ("http", "https"):
        path = path.replace("@", "%40")  # as in SQLAlchemy, the part before an @ would be a password
    uri = f"{scheme}://{user}{host}/{path}"
    assume(not re.search("passw|pwd|odbc_connect|%", path, re.IGNORECASE))
    assert without_password(uri) == uri
    assert without_passwords(f"no answer from {uri} within 5 s") == f"no answer from {uri} within 5 s"


@pytest.mark.parametrize("uri", ["http://me:s3/cret@host", "postgresql://me:s3@cret@host/db", "http://me:s3#cret@host"])
def test_a_password_to_be_encoded_is_refused_without_being_shown(uri: str) -> None:
    with pytest.raises(
        ValueError, match=r"^tracking\.uri=\w+://me:PASSWORD@host.* percent-encoded \(@ as %40\)$"
    ) as error:
        check_uri(uri)
    assert "cret" not in str(error.value)


def test_links_have_no_credentials() -> None:
    assert server_address("https://me:p@ss@Host:5000/mlflow/") == "https://host:5000/mlflow"


def test_an_error_is_cut_only_after_its_passwords_are_hidden() -> None:
    error = RuntimeError(f"{'x' * 270} postgresql://me:{MARK * 10}@host-of-the-database\n[SQL: SELECT 1]")
    assert describe_error(error) == f"{'x' * 270} postgresql://me:PASSWORD@host"
    assert (
        describe_error(RuntimeError("(psycopg.Error) down\n\tor slow\n[SQL: SELECT 1]"))
        == "(psycopg.Error) down or slow"
    )
    assert describe_error(TimeoutError()) == "TimeoutError"


def test_nothing_slow_is_imported_to_show_a_uri() -> None:
    code = (
        "import sys, kdpipe.runs.store_address as store; store.in_store('postgresql://a:b@c/d', ''); "
        "assert not {'mlflow', 'sqlalchemy'} & {*sys.modules}"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
