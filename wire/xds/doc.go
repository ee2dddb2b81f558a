// Package xds carries knowledge from control to the nodes: the World to each
// proxy, a node's own pods to its agent, and back, what became of those pods. It
// is the only way on which knowledge travels. It speaks Envoy's delta discovery
// over gRPC with Istio's workload messages, so that what is known is never sent
// twice, and a foreign peer is understood.
//
// Control makes a Server and calls Update; a proxy runs a WorldClient, an agent
// a PodClient. All of gRPC that they need (Dial, Serve) is here, since no other
// package but wire/csr may import it.
//
// The package refuses to decide: what is announced is control's business, what is
// done with it the node's. It refuses a resource that it does not understand and
// keeps the last good one, and it gives a node nothing that another node has
// proved itself for.
package xds
