"""The block graph: nodes, edges, permissions, backends, drain."""
