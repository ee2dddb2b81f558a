package redirect

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os/exec"
	"strings"
	"sync"
	"time"

	"tacit.dev/pod/netns"
)

// ErrRules says that a namespace does not have the rules that it should have.
var ErrRules = errors.New("the rules are not as they should be")

// maxKnown bounds how many rulesets are remembered as the kernel tells them.
const maxKnown = 256

// Kernel applies rules, reads them back and removes them. Its methods may be
// called by many goroutines at once, for different namespaces.
type Kernel struct {
	nft string // path of the nft program
	// refuse finds out, once, whether the kernel lacks what lets connections wait.
	refuse func() bool
	// gated finds out, once, why the kernel has nothing that stands behind the rules.
	gated func() error
	// leads finds out, once, why the kernel cannot lead to the proxy what a pod forwards.
	leads func() error
	// node is the addresses of the node whose pods these are.
	node []netip.Addr

	// mu guards what follows.
	mu sync.Mutex
	// scratch is a namespace nobody is in, where a ruleset is loaded once to
	// learn what the kernel says of it. Made when first needed.
	scratch *netns.NS
	// known is, by text of a ruleset, the kernel's own words for it.
	known map[string]digest
	// pods is what is remembered of those with rules.
	pods map[netns.Key]*memory
}

// NewKernel finds the nft program, and starts nothing. The addresses are the node's:
// from there, and from its pods' gateways, probes come. Close it.
func NewKernel(node ...netip.Addr) (*Kernel, error) {
	nft, err := exec.LookPath("nft")
	if err != nil {
		nft, err = exec.LookPath("/usr/sbin/nft")
	}
	if err != nil {
		return nil, fmt.Errorf("find nft (install the package nftables): %w", err)
	}
	k := &Kernel{nft: nft, node: node, known: make(map[string]digest), pods: make(map[netns.Key]*memory)}
	k.refuse = sync.OnceValue(func() bool { return !k.hasSocket() })
	k.gated = sync.OnceValue(tryGate)
	k.leads = sync.OnceValue(tryLead)
	return k, nil
}

// Close lets go of what Kernel holds. No rule changes.
func (k *Kernel) Close() error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.scratch == nil {
		return nil
	}
	ns := k.scratch
	k.scratch = nil
	return ns.Close()
}

// Apply gives the namespace exactly the rules of c, whatever it had of ours
// before, and reads them back. Nothing that is established is interrupted; what begins in
// the moment of the change may begin a second later; and what is sent while an interface
// gets its first clsact is lost. After an error the rules are either the old or the new
// ones, never a part; Apply may be called again.
func (k *Kernel) Apply(ctx context.Context, ns *netns.NS, c Config) error {
	return k.apply(ctx, ns, c, false)
}

// Repair is Apply for a pod that was captured and may not have been for a while.
// What the proxy relays goes on; what ended unseen is forgotten; and what began unseen
// ends: it is in nobody's list.
func (k *Kernel) Repair(ctx context.Context, ns *netns.NS, c Config) error {
	if k.Check(ctx, ns, c) == nil {
		// It is another agent's work, and well done; it may have died before it was done.
		return k.load(ctx, ns, release)
	}
	d, err := readTable(ns)
	lost := err == nil && d == (digest{})
	if lost {
		err = forgetUntouched(ns)
	}
	if err != nil {
		return fmt.Errorf("repair rules in namespace %d: %w", ns.Inode(), err)
	}
	return k.apply(ctx, ns, c, lost)
}

// apply is both. lost says that the pod was captured, and has no rules.
func (k *Kernel) apply(ctx context.Context, ns *netns.NS, c Config, lost bool) error {
	// The way back first: a connection captured before it exists would hang.
	if err := errors.Join(addReplyRoutes(ns), k.setSysctls(ns)); err != nil {
		return fmt.Errorf("apply rules in namespace %d: %w", ns.Inode(), err)
	}
	complete, err := k.completed(ns, c)
	if err != nil {
		return err
	}
	// The gate lets leave what the rules of a capture have passed, and those alone mark it. What
	// rules have led to the proxy must not leave: its filter comes first.
	if c.Drain {
		err = k.stand(ns, standing{lead: true})
	} else {
		err = k.lead(ns)
	}
	if err == nil {
		err = k.swap(ctx, ns, complete, lost)
	}
	if err == nil && !c.Drain {
		err = k.stand(ns, standing{gate: true, lead: true})
	}
	if err != nil {
		return fmt.Errorf("apply rules in namespace %d: %w", ns.Inode(), err)
	}
	return k.Check(ctx, ns, c)
}

// Check reads rules, routes and sysctls back. The error is ErrRules if they differ from
// those of c in any way.
func (k *Kernel) Check(ctx context.Context, ns *netns.NS, c Config) error {
	c, err := k.completed(ns, c)
	if err != nil {
		return err
	}
	got, err := readTable(ns)
	if err != nil {
		return fmt.Errorf("read rules in namespace %d: %w", ns.Inode(), err)
	}
	if is, err := k.isOf(ctx, got, c); err != nil {
		return err
	} else if !is {
		return fmt.Errorf("namespace %d, table inet tacit: %w", ns.Inode(), ErrRules)
	}
	return errors.Join(checkReplyRoutes(ns), checkSysctls(ns), k.checkStanding(ns, standing{gate: !c.Drain, lead: true}))
}

// Remove takes away all that Apply made, but for an empty clsact at each interface, which
// decides nothing and ends with it. It is no error if nothing is there.
// The relayed connections of the pod must have ended: they break. What the application
// still has of them is reset, for it would go on in clear.
func (k *Kernel) Remove(ctx context.Context, ns *netns.NS) error {
	err := k.endCaptured(ns)
	if err == nil {
		err = k.stand(ns, standing{})
	}
	if err == nil {
		err = k.load(ctx, ns, release+"add table inet tacit\ndelete table inet tacit\n")
	}
	if err == nil {
		err = forgetAll(ns)
	}
	if err := errors.Join(err, delReplyRoutes(ns), k.restoreSysctls(ns)); err != nil {
		return fmt.Errorf("remove rules in namespace %d: %w", ns.Inode(), err)
	}
	k.forget(ns)
	return nil
}

// isOf reports whether a table is of c, with rules about what was there before or without:
// whether there was something, the sets know, and whoever may change rules may empty those.
func (k *Kernel) isOf(ctx context.Context, got digest, c Config) (bool, error) {
	for _, c.kept = range []bool{false, true} {
		if want, err := k.expected(ctx, Ruleset(c)); err != nil || got == want {
			return err == nil, err
		}
	}
	return false, nil
}

// expected is what the kernel says of a ruleset. To compare texts would not do:
// each version of nft writes them differently.
func (k *Kernel) expected(ctx context.Context, text string) (digest, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if d, ok := k.known[text]; ok {
		return d, nil
	}
	if err := k.makeScratch(); err != nil {
		return digest{}, err
	}
	if err := k.load(ctx, k.scratch, text); err != nil {
		return digest{}, fmt.Errorf("load rules in a namespace of our own: %w", err)
	}
	d, err := readTable(k.scratch)
	if err != nil {
		return digest{}, fmt.Errorf("read rules in a namespace of our own: %w", err)
	}
	if len(k.known) >= maxKnown {
		clear(k.known)
	}
	k.known[text] = d
	return d, nil
}

// Waits reports whether a connection of a captured pod waits while nobody accepts it.
// Otherwise it is refused: the kernel has no nft_socket.
func (k *Kernel) Waits() bool { return !k.refuse() }

// hasSocket reports whether the kernel has nft_socket, without which a connection
// that nobody accepts is refused, and does not wait.
func (k *Kernel) hasSocket() bool {
	ns, err := netns.Unnamed()
	if err != nil {
		return true // then nothing else goes either, and says so
	}
	defer ns.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	return k.load(ctx, ns, "table inet tacit {\n chain c {\n type filter hook input priority 0;\n socket transparent 0 return\n }\n}\n") == nil
}

func (k *Kernel) makeScratch() (err error) {
	if k.scratch == nil {
		k.scratch, err = netns.Unnamed()
	}
	return err
}

// load runs nft inside the namespace. The transaction happens as a whole or not
// at all.
func (k *Kernel) load(ctx context.Context, ns *netns.NS, text string) error {
	cmd := exec.CommandContext(ctx, k.nft, "-f", "-")
	cmd.Stdin = strings.NewReader(text)
	var out strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &out
	// A process is in the namespace of the thread that starts it.
	if err := ns.Do(cmd.Start); err != nil {
		return fmt.Errorf("start nft: %w", err)
	}
	if err := cmd.Wait(); err != nil {
		return fmt.Errorf("nft (needs CAP_NET_ADMIN and the kernel's nf_tables): %w: %s", err, strings.TrimSpace(out.String()))
	}
	return nil
}
