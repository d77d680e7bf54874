"""The sweep: dispatcher, hosts, searcher, runner."""
