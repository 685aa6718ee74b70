"""Runs on several machines: the hostfile, launching with pdsh, supervising and comparing hosts."""
