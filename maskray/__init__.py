"""maskray from Python: `import maskray`, `client = maskray.connect()`, `client.submit(...)`.

See docs/python.md. Everything else is the code's own affair and may change.
"""

from orchestrator.face import Session, StudyHandle, TrialHandle, connect

__all__ = ["Session", "StudyHandle", "TrialHandle", "connect"]
