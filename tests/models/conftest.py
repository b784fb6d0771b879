"""Puts this folder on the path: several of its tests read ``hf_cases``."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
