package lab

import (
	"fmt"
	"os"
	"strings"

	corev1 "k8s.io/api/core/v1"
)

// hostsLocked is the /etc/hosts of every pod: itself, and the services by the names
// that a cluster's DNS knows. Cluster.mu is held.
func (c *Cluster) hostsLocked(services []*corev1.Service, pods []*pod) map[*pod]string {
	out := map[*pod]string{}
	for _, p := range pods {
		if p.mounts == nil {
			continue // its hosts come with its mounts
		}
		var b strings.Builder
		fmt.Fprintf(&b, "127.0.0.1 localhost\n::1 localhost\n%s %s\n%s %s\n", p.address.v4, p.name, p.address.v6, p.name)
		for _, s := range services {
			names := serviceNames(s, p.namespace)
			for _, a := range serviceAddresses(s, pods) {
				fmt.Fprintf(&b, "%s %s\n", a, names)
			}
		}
		out[p] = b.String()
	}
	return out
}

// serviceNames are the names of s as seen from a namespace.
func serviceNames(s *corev1.Service, from string) string {
	long := s.Name + "." + s.Namespace
	names := fmt.Sprintf("%[1]s.svc.cluster.local %[1]s.svc %[1]s", long)
	if s.Namespace == from {
		names += " " + s.Name
	}
	return names
}

// serviceAddresses are the virtual ones, or for a headless service its ready pods'.
func serviceAddresses(s *corev1.Service, pods []*pod) []string {
	if s.Spec.ClusterIP != corev1.ClusterIPNone {
		return s.Spec.ClusterIPs
	}
	var out []string
	for _, slice := range sliceObjects(s, pods) {
		for _, e := range slice.Endpoints {
			if *e.Conditions.Ready {
				out = append(out, e.Addresses...)
			}
		}
	}
	return out
}

// writeHosts changes the file in place: the pods have it bound over /etc/hosts, and
// another file at the same name would not be theirs.
func writeHosts(path, text string) error {
	had, err := os.ReadFile(path)
	if err == nil && string(had) == text {
		return nil
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := f.WriteAt([]byte(text), 0); err != nil {
		return err
	}
	return f.Truncate(int64(len(text)))
}
