"""`casemate exec` against a real manager and simulated hosts: output, input, exit codes, and who is asked."""

from support.fleet import Fleet

MANIFEST = """
apiVersion: casemate/v1
kind: Environment
metadata: {name: exec-it}
spec:
  cpu: {count: 1}
  memory: {size: 256Mi}
  image: debian-13
  disk: {size: 2Gi}
  pods:
    - apiVersion: v1
      kind: Pod
      metadata: {name: web}
      spec: {containers: [{name: app, image: localhost/hello:1}, {name: side, image: localhost/hello:1}]}
"""


def test_exec(fleet: Fleet) -> None:
    fleet.run("apply", "-f", "-", stdin=MANIFEST).ok()
    try:
        fleet.run("wait", "env/exec-it", "--for", "Ready", "--timeout", "60s").ok()
        assert fleet.run("exec", "exec-it", "-c", "app", "--", "echo", "hi", "there").ok() == "hi there\n"
        assert fleet.run("exec", "-i", "exec-it-0.web", "-c", "app", "--", "cat", stdin="through\n").ok() == "through\n"
        missing = fleet.run("exec", "exec-it", "-c", "app", "--", "no-such-command")
        assert missing.code == 127
        ambiguous = fleet.run("exec", "exec-it", "--", "echo", "hi")
        assert ambiguous.code == 1
        assert "name one: app, side" in ambiguous.err
        nobody = fleet.run("exec", "nobody", "--", "echo")
        assert nobody.code == 4
        assert fleet.run("exec", "exec-it").code != 0
    finally:
        fleet.run("delete", "env/exec-it").ok()
