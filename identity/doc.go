// Package identity holds what proves a mesh.ID: the leaf certificate with its
// key, the bundle that others are checked against, and the TLS configurations
// made of them. On the way of a connection it stands right before wire/direct:
// a proxy takes the leaf of the pod that it speaks for from the Keeper, and the
// tls.Config for that leaf and that peer from TLS.
//
// Keys are made here and never leave the process. The package asks for
// certificates through a Signer and knows no protocol to do so.
//
// It refuses to guess: a certificate without exactly one URI SAN in the form of
// mesh.ID is nobody's, a name in the Common Name or a DNS SAN counts for
// nothing, and there is no way to switch verification off.
package identity
