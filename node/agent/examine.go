package agent

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"tacit.dev/mesh"
	"tacit.dev/pod/netns"
	"tacit.dev/pod/redirect"
	"tacit.dev/wire/finding"
)

// otherMeshes are the plugins of meshes that lead a pod's connections elsewhere.
var otherMeshes = []string{"istio-cni", "linkerd-cni", "kuma-cni", "consul-cni"}

// Examine looks whether this node has what an agent with the same Config needs, by
// doing what an agent does, in a namespace of its own. It changes nothing.
func Examine(ctx context.Context, cfg Config) []finding.Finding {
	return slices.Concat(
		[]finding.Finding{examineKernel()},
		examineNamespace(ctx),
		examineProcesses(ctx, cfg.Proc),
		examineChain(cfg),
		examineFolder("folder of plugins", cfg.ProgramDir, "node.cni.binDir"),
	)
}

func examineKernel() finding.Finding {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return finding.Finding{What: "kernel", Lacks: err.Error()}
	}
	return finding.Finding{What: "kernel", Found: unix.ByteSliceToString(u.Release[:])}
}

// examineNamespace does in an empty namespace what is done in a pod's.
func examineNamespace(ctx context.Context) []finding.Finding {
	ns, err := netns.Unnamed()
	if err != nil {
		return []finding.Finding{{What: "namespaces", Lacks: err.Error(), Remedy: "allow privileged pods (capabilities SYS_ADMIN and NET_ADMIN) in this namespace, and network namespaces on the node"}}
	}
	defer ns.Close()
	return []finding.Finding{examineRules(ctx, ns), examineSockets(ns)}
}

func examineRules(ctx context.Context, ns *netns.NS) finding.Finding {
	k, err := redirect.NewKernel()
	if err != nil {
		return finding.Finding{What: "rules", Lacks: err.Error(), Remedy: "use the image tacit-node, which has nft"}
	}
	defer k.Close()
	if err := k.Apply(ctx, ns, redirect.Config{ExcludeInbound: []uint16{1}}); err != nil {
		return finding.Finding{What: "rules", Lacks: err.Error(),
			Remedy: "the kernel needs nf_tables with nat, redirect, tproxy, fib, connection tracking and its zones: load nf_tables, nft_redir, nft_tproxy, nft_fib_inet, nft_ct, nf_conntrack, or a newer kernel"}
	}
	found := "nftables: redirect, fib, zones, socket"
	if !k.Waits() {
		found = "nftables: redirect, fib, zones; no nft_socket, so connections are refused while agent and proxy are both away"
	}
	if err := k.Gated(); err != nil {
		found += "; no gate behind the rules, so a pod that may flush them can send in clear until they are put back: " + err.Error()
	}
	if err := k.Leads(); err != nil {
		found += "; what pods forward for containers within them is refused, and not captured: " + err.Error()
	}
	return finding.Finding{What: "rules", Found: found}
}

func examineSockets(ns *netns.NS) finding.Finding {
	families := []int{4}
	if six, err := ns.HasIPv6(); err == nil && six {
		families = append(families, 6)
	}
	for _, family := range families {
		fds, err := ns.Sockets(netns.SocketConfig{Family: family, Count: 1, Mark: mesh.Mark})
		if err != nil {
			return finding.Finding{What: "sockets", Lacks: err.Error(), Remedy: "allow the capability NET_ADMIN, and the kernel's transparent sockets (CONFIG_NETFILTER_XT_TARGET_TPROXY or CONFIG_NFT_TPROXY is not needed, CONFIG_IP_ADVANCED_ROUTER is)"}
		}
		for _, fd := range fds {
			unix.Close(fd)
		}
	}
	// An address of the documentation's (RFC 5737).
	fd, err := ns.BindForeign(netip.MustParseAddrPort("192.0.2.1:1"), mesh.Mark)
	if err != nil {
		return finding.Finding{What: "sockets", Lacks: err.Error(), Remedy: "allow the capability NET_BIND_SERVICE: some clients have privileged ports"}
	}
	unix.Close(fd)
	return finding.Finding{What: "sockets", Found: fmt.Sprintf("marked and transparent, IPv%s", strings.Trim(fmt.Sprint(families), "[]"))}
}

func examineProcesses(ctx context.Context, proc string) []finding.Finding {
	if proc == "" {
		return nil
	}
	found, err := netns.Find(ctx, proc, func(string) bool { return true })
	if err != nil {
		return []finding.Finding{{What: "running pods", Lacks: err.Error(), Remedy: "allow the capability SYS_PTRACE, and a hostPath of the node's /proc"}}
	}
	return []finding.Finding{{What: "running pods", Found: fmt.Sprintf("%d with a network of their own", len(found))}}
}

// examineChain looks at what the plugin would follow.
func examineChain(cfg Config) []finding.Finding {
	if cfg.Chain.Dir == "" {
		return nil
	}
	file, types, err := cfg.Chain.Base()
	if err != nil {
		return []finding.Finding{{What: "network", Lacks: err.Error(), Remedy: "install the network of the cluster first, and name its folder by node.cni.confDir"}}
	}
	all := []finding.Finding{{What: "network", Found: fmt.Sprintf("%s (%s)", file, strings.Join(types, ", "))}}
	for _, t := range types {
		if slices.Contains(otherMeshes, t) {
			all = append(all, finding.Finding{What: "other meshes", Lacks: fmt.Sprintf("plugin %s in %s leads the connections of pods elsewhere", t, file),
				Remedy: "remove that mesh, or leave its nodes out by node.nodeSelector"})
		}
	}
	return append(all, examineFolder("folder of networks", cfg.Chain.Dir, "node.cni.confDir")...)
}

// examineFolder asks whether a folder can be written.
func examineFolder(what, dir, value string) []finding.Finding {
	if dir == "" {
		return nil
	}
	if err := unix.Access(dir, unix.W_OK); err != nil {
		return []finding.Finding{{What: what, Lacks: fmt.Sprintf("write to %s: %v", dir, err), Remedy: "name the folder of the container runtime by " + value}}
	}
	return []finding.Finding{{What: what, Found: "writable"}}
}
