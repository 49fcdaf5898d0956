"""Runs on Kubernetes: manifests, the cluster, and following the Jobs."""
