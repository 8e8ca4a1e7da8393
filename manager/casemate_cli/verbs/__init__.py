"""One module for each family of verbs; imported by `casemate_cli.app` when a verb is called for."""
