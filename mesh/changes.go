package mesh

// Changes is what differs in the mesh: what is new or other than before, and the names of
// what is gone. No name is in it twice. The order within it is of no account.
type Changes struct {
	Workloads []*Workload
	Services  []*Service
	Places    []*Place
	// Gone are UIDs of workloads, Keys of services and Names of places.
	Gone []string
}
