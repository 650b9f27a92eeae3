import subprocess
import sys

import pytest

from fedtrain.link.handshakes import _reason

SAYS = """
import logging, os, sys
from fedtrain.link.handshakes import watched
with watched():
    assert os.environ["GRPC_VERBOSITY"] == "INFO"
    print("before", file=sys.stderr, flush=True)
    os.write(2, b"W1122 08:52:59.063742   23108 log.cc:102] Log level INFO is not suitable for production. Prefer\\n")
    for _ in range(2):
        os.write(2, b"I1122 08:52:59.174604   23112 ssl_transport_security.cc:2563] Handshake failed with error "
                    b"SSL_ERROR_SSL: error:100000f7:SSL routines:OPENSSL_internal:WRONG_VERSION_NUMBER: Invalid\\n")
    os.write(2, b"I1122 08:52:59.174604   23112 other.cc:1] nobody wants to know\\n")
    os.write(2, b"E1122 08:52:59.174604   23112 other.cc:1] this is serious\\n")
print("after", file=sys.stderr, flush=True)
"""


def test_what_grpc_says_of_handshakes_is_a_warning_and_the_rest_passes() -> None:
    done = subprocess.run([sys.executable, "-c", SAYS], capture_output=True, text=True, check=True)
    refused = "a connection is refused in its TLS handshake: it speaks no TLS"
    first, *others, last = done.stderr.splitlines()
    assert (first, last) == ("before", "after")
    assert sorted(others) == ["E1122 08:52:59.174604   23112 other.cc:1] this is serious", refused]


@pytest.mark.parametrize(
    ("what", "why"),
    [
        ("PEER_DID_NOT_RETURN_A_CERTIFICATE: Invalid", "it shows no certificate"),
        (
            "CERTIFICATE_VERIFY_FAILED: certificate has expired",
            "its certificate is not trusted: certificate has expired",
        ),
        ("SOMETHING_NEW", "SOMETHING_NEW"),
    ],
)
def test_reasons(what: str, why: str) -> None:
    line = f"x.cc:1] Handshake failed with error SSL_ERROR_SSL: error:100000f7:SSL routines:OPENSSL_internal:{what}"
    assert _reason(line) == why
    assert _reason(line.replace("Handshake", "Coffee")) is None
