"""The ``slimkit`` command: one thin file per verb."""
