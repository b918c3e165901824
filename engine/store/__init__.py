"""Keep the shared statistics in a database: queries, groups, leases, roles, published weights."""
