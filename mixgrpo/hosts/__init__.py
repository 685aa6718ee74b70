"""A run on several machines: the hostfile, starting by pdsh, watching, comparing the machines."""
