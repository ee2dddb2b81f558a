package mesh

// Process is one of Tacit's two processes on a node, as its token proves it. The proxy
// parses what the network sends, so its token is worth nothing where an agent speaks.
type Process struct {
	Node  string
	Agent bool // else the proxy
}

func (p Process) String() string {
	if p.Agent {
		return "agent of " + p.Node
	}
	return "proxy of " + p.Node
}
