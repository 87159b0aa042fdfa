"""The record of a run: theta_T is a function of theta_0 and of the list of updates, and a journal holds the list.

    preamble | header (JSON) | crc | record 0 | record 1 | ...          docs/journal.md has every byte

The public names, nothing else. What a step decides belongs to optim/, applying a record to weights to optim/run.py.
"""

from zo_kernels.journal.factors import InputFactors, factors_of, factors_path
from zo_kernels.journal.header import Frozen, Header, Parameter, check_sha256, described, digest, find, fingerprint, verify_base
from zo_kernels.journal.layout import (
    CONTRACT,
    FLAGS,
    FORMAT,
    MAGIC,
    MAX_DIMENSIONS,
    MAX_GROUPS,
    MAX_HEADER,
    MAX_NAME,
    MAX_RECORD,
    MAX_TERMS,
    MAX_ZEROS,
    PERTURBATIONS,
    DamagedError,
    LockedError,
    TornError,
    UnbegunError,
)
from zo_kernels.journal.reader import Journal, Tail, loads, read
from zo_kernels.journal.start import start_of, start_path, with_start
from zo_kernels.journal.writer import Writer, create, recover, reopen, write_factors, write_start

__all__ = [
    "CONTRACT",
    "FLAGS",
    "FORMAT",
    "MAGIC",
    "MAX_DIMENSIONS",
    "MAX_GROUPS",
    "MAX_HEADER",
    "MAX_NAME",
    "MAX_RECORD",
    "MAX_TERMS",
    "MAX_ZEROS",
    "PERTURBATIONS",
    "DamagedError",
    "Frozen",
    "Header",
    "InputFactors",
    "Journal",
    "LockedError",
    "Parameter",
    "Tail",
    "TornError",
    "UnbegunError",
    "Writer",
    "check_sha256",
    "create",
    "described",
    "digest",
    "factors_of",
    "factors_path",
    "find",
    "fingerprint",
    "loads",
    "read",
    "recover",
    "reopen",
    "start_of",
    "start_path",
    "verify_base",
    "with_start",
    "write_factors",
    "write_start",
]
