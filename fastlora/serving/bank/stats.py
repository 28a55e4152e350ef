"""``BankStats``: what a bank counts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class BankStats:
    """Counts since the bank was made, and what it holds now.

    hits, misses: adapters asked for that were on the device, or not. loads: copies to the device.
    reads: loads for which files were read again. evictions: adapters that made room.
    known, resident, copied: adapters that the bank knows, that are on the device, that are in the
    host's memory. leases: of adapters now, pins included. device_bytes, device_bytes_used,
    host_bytes_used: of pages, of pages in use, of host copies.
    """

    hits: int = 0
    misses: int = 0
    loads: int = 0
    reads: int = 0
    evictions: int = 0
    known: int = 0
    resident: int = 0
    copied: int = 0
    leases: int = 0
    device_bytes: int = 0
    device_bytes_used: int = 0
    host_bytes_used: int = 0
