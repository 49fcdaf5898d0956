"""The logger of all modules."""

import logging

log = logging.getLogger("fivefold")
