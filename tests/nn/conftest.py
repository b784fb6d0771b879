"""Puts this folder on the path: several of its tests read ``equations``, the reference, and share recipes, layers
and models."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
