"""Many runs on a cluster: studies, ledger, queue, Ray, reports, HTTP and the `maskray` command."""
