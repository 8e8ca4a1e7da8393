"""What every test gets: guards against leaks, golden files, and groups with their times.

The three plug-ins below each own one of these; fixtures that a single package needs live beside its tests.
"""

import os

import hypothesis

pytest_plugins = ["support.guards", "support.golden", "support.groups"]

# A property test that fails says how to replay itself. In CI the examples are the same on each run, so that a change is
# never blamed for what another seed would have found yesterday; by hand, each run looks at new ones.
hypothesis.settings.register_profile("casemate", deadline=None, database=None, print_blob=True)
hypothesis.settings.register_profile(
    "casemate-ci", parent=hypothesis.settings.get_profile("casemate"), derandomize=True
)
hypothesis.settings.load_profile("casemate-ci" if os.environ.get("CI") == "true" else "casemate")
