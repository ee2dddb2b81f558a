// Package mesh holds the nouns of Tacit: who a pod is (ID), what runs where
// (Workload, Peer, Service, World), what a node is told to enroll (Pod), and what
// happened on one connection (Flow). Every other package speaks in these
// words, and in no others for the same thing:
//
//	mesh         all pods that talk mutual TLS to each other under one trust domain
//	node         a machine with one agent and one proxy
//	away         of a node: not connected, and waited for; then it is gone
//	lost         of a node: a person has said that it does not act any more
//	process      the agent or the proxy of a node, as its token proves it
//	pod          a network namespace with an identity, on one node
//	workload     a pod as the others see it: addresses, identity, services
//	service      a name and virtual addresses for a set of workloads
//	peer         a workload as a World keeps it, small
//	endpoint     one workload and port behind a port of a service
//	place        addresses that are a node's, contested, or in the cluster's ranges
//	inlet        an address or a node's port that leads to a service, besides its own
//	contested    several objects claim an address, and nobody knows who is right
//	policy       who may connect to some workloads, and who may not
//	identity     spiffe://TRUST-DOMAIN/ns/NAMESPACE/sa/SERVICE-ACCOUNT
//	bundle       the root certificates that are trusted
//	leaf         the certificate of one identity on one node
//	enroll        to make a pod part of the mesh; un-enroll, to take it out
//	capture      to redirect a pod's connections into the proxy
//	bypass       traffic of an enrolled pod that was not captured
//	protected    enrolled, captured, and with a valid certificate
//	direct       one TLS connection per application connection (wire/direct)
//	mode         what becomes of plaintext: permissive or strict, inbound and outbound
//	permissive   plaintext is passed on, and counted
//	strict       plaintext is refused, but for exceptions
//	outbound     from the application to the network
//	inbound      from the network to the application
//	pair         connections between two parties to one port, summed up
//	party        a workload, a node or a block of addresses
//
// The package imports the standard library only, does no I/O and reads no clock.
package mesh
