"""Who is there and where: directories of peers. Embedded (static addresses, the coordinator's list); etcd comes later."""
