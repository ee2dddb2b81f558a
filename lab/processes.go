package lab

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"syscall"

	"golang.org/x/sys/unix"

	"tacit.dev/mesh"
)

const (
	// proxyUser is who the proxy is, as in its image. In a user namespace of an
	// ordinary user there is but one user.
	proxyUser = 65532

	// noRootLocked is SECBIT_NOROOT and SECBIT_NOROOT_LOCKED of linux/securebits.h:
	// user 0 is nobody special, for good.
	noRootLocked = 1<<0 | 1<<1

	bundleName = "bundle.pem"

	controlAdmin = "127.0.0.1:15022"
)

// tacit is a command of one of Tacit's programs with a role's extra flags.
func (c *Cluster) tacit(program, role string, args ...string) *exec.Cmd {
	args = append(args, "--log-format", "text")
	cmd := exec.Command(filepath.Join(c.options.Bin, program), append(args, c.options.Flags[role]...)...)
	cmd.Dir = "/"
	return cmd
}

func (c *Cluster) startControl(ctx context.Context) error {
	if !c.options.Mesh {
		return nil
	}
	if err := c.options.placePrograms(); err != nil {
		return err
	}
	command := func() *exec.Cmd {
		return c.tacit("tacit-control", "control",
			"--source", string(c.objects), "--state", filepath.Join(c.dir, "state"),
			"--listen", netip.AddrPortFrom(control4, controlPort).String(), "--admin", controlAdmin, "--profiles",
			"--trust-domain", c.options.TrustDomain, "--tokens", filepath.Join(c.dir, "tokens"))
	}
	return c.keep(ctx, "control", command, (*exec.Cmd).Start)
}

// keep has a process kept until the lab ends.
func (c *Cluster) keep(ctx context.Context, name string, command func() *exec.Cmd, start func(*exec.Cmd) error) error {
	k := newKeeper(c, name, command, start)
	c.mu.Lock()
	c.keepers[name] = k
	c.mu.Unlock()
	return c.spawn(ctx, k.run)
}

// startNode starts the agent and the proxy of a node.
func (c *Cluster) startNode(ctx context.Context, n *node) error {
	if !c.options.Mesh || n.bare {
		return nil
	}
	if err := errors.Join(c.makeToken(mesh.Process{Node: n.name}, proxyUser), c.makeToken(mesh.Process{Node: n.name, Agent: true}, 0), c.copyBundle(ctx)); err != nil {
		return err
	}
	if err := os.MkdirAll(n.dir, 0o755); err != nil {
		return err
	}
	return c.startTeam(ctx, n, 0)
}

// startTeam starts a team of a node, beside the one that may be there.
func (c *Cluster) startTeam(ctx context.Context, n *node, p team) error {
	common := []string{
		"--node", n.name, "--control", netip.AddrPortFrom(control4, controlPort).String(),
		"--bundle", filepath.Join(c.dir, bundleName),
	}
	agent := func() *exec.Cmd {
		args := append([]string{"agent", "--token", c.token(mesh.Process{Node: n.name, Agent: true}), "--run", n.dir, "--handle", p.handle(n), "--admin", p.admin(n, "agent"), "--metrics", p.metrics(n), "--profiles"}, common...)
		if c.rootful() {
			args = append(args, "--proxy-uid", strconv.Itoa(proxyUser))
		}
		return c.tacit("tacit-node", "agent", args...)
	}
	proxy := func() *exec.Cmd {
		args := append([]string{"proxy", "--token", c.token(mesh.Process{Node: n.name}), "--handle", p.handle(n), "--admin", p.admin(n, "proxy"), "--agent-metrics", p.metrics(n), "--profiles",
			"--drain", "0s"}, common...) // a story that wants a drain says how long
		return c.tacit("tacit-node", "proxy", args...)
	}
	return errors.Join(
		c.keep(ctx, p.process(n, "agent"), agent, func(cmd *exec.Cmd) error { return n.ns.Do(cmd.Start) }),
		c.keep(ctx, p.process(n, "proxy"), proxy, func(cmd *exec.Cmd) error { return c.startUnprivileged(n, cmd) }))
}

// rootful reports whether there are other users than root in the lab.
func (c *Cluster) rootful() bool {
	text, err := os.ReadFile("/proc/self/uid_map")
	return err == nil && !bytes.HasSuffix(bytes.TrimSpace(text), []byte(" 1"))
}

// startUnprivileged starts cmd in the node's namespace as the runtime starts the
// proxy's container: another user, no capability, and no way to gain one. The
// thread that gave all that up is not used again.
func (c *Cluster) startUnprivileged(n *node, cmd *exec.Cmd) error {
	if c.rootful() {
		cmd.SysProcAttr = &syscall.SysProcAttr{
			Setpgid:    true,
			Credential: &syscall.Credential{Uid: proxyUser, Gid: proxyUser},
		}
	}
	return n.ns.Do(func() error {
		runtime.LockOSThread() // once more than Do unlocks: the thread dies
		if err := unix.Prctl(unix.PR_SET_SECUREBITS, noRootLocked, 0, 0, 0); err != nil {
			return fmt.Errorf("set securebits: %w", err)
		}
		for capability := range uintptr(unix.CAP_LAST_CAP + 1) {
			// EINVAL: a kernel that does not have that one.
			if err := unix.Prctl(unix.PR_CAPBSET_DROP, capability, 0, 0, 0); err != nil && !errors.Is(err, unix.EINVAL) {
				return fmt.Errorf("drop capability %d: %w", capability, err)
			}
		}
		if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
			return fmt.Errorf("set no_new_privs: %w", err)
		}
		return cmd.Start()
	})
}

// token is the file of the secret with which a process proves itself.
func (c *Cluster) token(p mesh.Process) string {
	folder := "proxies"
	if p.Agent {
		folder = "agents"
	}
	return filepath.Join(c.dir, "tokens", folder, p.Node)
}

// makeToken makes it, to be read by that user and nobody else; in a user namespace there
// is only one.
func (c *Cluster) makeToken(p mesh.Process, user int) error {
	path := c.token(p)
	if _, err := os.Stat(path); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := os.WriteFile(path, []byte(rand.Text()+"\n"), 0o400); err != nil {
		return err
	}
	if c.rootful() {
		return os.Chown(path, user, 0)
	}
	return nil
}

// copyBundle puts the roots that nodes trust where every user can read them, as a
// ConfigMap would; control's own folder is private.
func (c *Cluster) copyBundle(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	var text []byte
	err := until(ctx, func() (err error) {
		text, err = os.ReadFile(filepath.Join(c.dir, "state", bundleName))
		return err
	})
	if err != nil {
		return fmt.Errorf("tacit-control makes no bundle (tacit lab log control): %w", err)
	}
	tmp := filepath.Join(c.dir, ".bundle-"+rand.Text())
	if err := os.WriteFile(tmp, text, 0o644); err != nil {
		return err
	}
	return os.Rename(tmp, filepath.Join(c.dir, bundleName))
}

// kept finds a process of Tacit by its name: control, NODE/agent, NODE/proxy.
func (c *Cluster) kept(name string) *keeper {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.keepers[name]
}
