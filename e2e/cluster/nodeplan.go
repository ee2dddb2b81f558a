package cluster

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"text/template"

	"golang.org/x/sys/unix"

	"tacit.dev/e2e/machine"
)

// Where things are inside of a node.
const (
	nodePrograms = "/opt/kubernetes"
	nodeImages   = "/opt/images"
	nodePath     = nodePrograms + ":/usr/sbin:/usr/bin"
)

// nodePlan has the processes of a node, and the root that they live in.
func (c *Cluster) nodePlan(n *node) (machine.Plan, error) {
	files, err := c.nodeFiles(n)
	if err != nil {
		return machine.Plan{}, err
	}
	return machine.Plan{
		Name:    n.name,
		Path:    nodePath,
		Sysctls: c.options.sysctls(),
		Root: &machine.Root{
			At:      filepath.Join(n.dir, "root"),
			Var:     filepath.Join(n.dir, "var"),
			Binds:   c.nodeBinds(),
			Copies:  map[string]string{"opt/cni/bin": filepath.Join(c.programs.Kubernetes, "cni")},
			Kept:    []string{"etc/cni/net.d", "opt/cni/bin"},
			Files:   files,
			Cgroups: c.cgroups.hierarchies,
			Kernel:  nodeKernel(),
		},
		Steps: c.nodeSteps(n),
	}, nil
}

// nodeBinds also has the folders of the images, which may be anywhere.
func (c *Cluster) nodeBinds() map[string]string {
	binds := map[string]string{nodePrograms: c.programs.Kubernetes}
	for i, image := range c.images {
		binds[imageFolder(i)] = filepath.Dir(image)
	}
	return binds
}

func imageFolder(i int) string { return fmt.Sprintf("%s/%d", nodeImages, i) }

// nodeKernel is what the kubelet wants to read: it would set some of these for the
// whole machine, and ends when it cannot. The boot id makes a reboot one.
func nodeKernel() map[string]string {
	return map[string]string{
		"vm/overcommit_memory": "1", "vm/panic_on_oom": "0", "kernel/panic": "10", "kernel/panic_on_oops": "1",
		"kernel/keys/root_maxkeys": "1000000", "kernel/keys/root_maxbytes": "25000000",
		"kernel/random/boot_id": randomUUID(),
	}
}

// nodeSteps: containerd, its images, then what uses both. Each node is a zone of its
// own, from its first moment: kube-proxy does not bear a change.
func (c *Cluster) nodeSteps(n *node) []machine.Step {
	steps := []machine.Step{keep("containerd", "containerd", "--config", "/etc/containerd/config.toml", "--log-level", "info")}
	for i, image := range c.images {
		file := filepath.Join(imageFolder(i), filepath.Base(image))
		steps = append(steps, machine.Step{Name: "import " + image, Log: "/var/log/import.log",
			Command: []string{"ctr", "-n", "k8s.io", "images", "import", file}})
	}
	return append(steps,
		keep("kubelet", "kubenode", "kubelet", "--config=/etc/kubernetes/kubelet.yaml", "--kubeconfig=/etc/kubernetes/kubelet.kubeconfig",
			"--hostname-override="+n.name, "--node-labels=topology.kubernetes.io/zone=zone-"+n.name,
			"--register-with-taints="+strings.Join(n.taints, ","), "--node-ip="+addresses(c.options.nodeAddresses(n.number)), "--v=2"),
		keep("kube-proxy", "kubenode", "kube-proxy", "--config=/etc/kubernetes/kube-proxy.yaml", "--v=2"))
}

func keep(name string, command ...string) machine.Step {
	return machine.Step{Name: name, Command: command, Keep: true, Log: "/var/log/" + name + ".log"}
}

// settings are what the templates of a node's files see.
type settings struct {
	Name, PodCIDRs, FileLimit, Images string
	Ranges                            []string
	DefaultRoutes                     []string
}

func (c *Cluster) nodeFiles(n *node) (map[string]string, error) {
	s := settings{Name: n.name, PodCIDRs: c.options.podCIDRs(), FileLimit: hardFileLimit()}
	for _, p := range c.options.nodePodCIDRs(n.number) {
		s.Ranges = append(s.Ranges, p.String())
	}
	s.DefaultRoutes = strings.Split(c.options.family("0.0.0.0/0", "::/0"), ",")
	files := map[string]string{
		"etc/hosts":       "127.0.0.1 localhost\n::1 localhost\n" + addressOf(c.options, n) + " " + n.name + "\n",
		"etc/resolv.conf": "",
		"etc/machine-id":  fmt.Sprintf("%x\n", sha256.Sum256([]byte(c.options.Name+"/"+n.name)))[:32] + "\n",
	}
	errs := []error{}
	for file, text := range nodeTemplates() {
		var err error
		files[file], err = render(text, s)
		errs = append(errs, err)
	}
	for file, name := range map[string]string{
		"ca.crt": "ca.crt", "kubelet.crt": "kubelet-" + n.name + ".crt", "kubelet.key": "kubelet-" + n.name + ".key",
		"kubelet.kubeconfig": "kubelet-" + n.name + ".kubeconfig", "kube-proxy.kubeconfig": "kube-proxy.kubeconfig",
	} {
		var err error
		files["etc/kubernetes/"+file], err = c.pki.read(name)
		errs = append(errs, err)
	}
	return files, errors.Join(errs...)
}

func addressOf(o Options, n *node) string { return o.nodeAddresses(n.number)[0].Addr().String() }

func render(text string, s settings) (string, error) {
	t, err := template.New("file").Parse(text)
	if err != nil {
		return "", err
	}
	var out bytes.Buffer
	err = t.Execute(&out, s)
	return out.String(), err
}

// hardFileLimit: the kubelet ends when it cannot have the limit it is told.
func hardFileLimit() string {
	var l unix.Rlimit
	if unix.Getrlimit(unix.RLIMIT_NOFILE, &l) != nil {
		return "1024"
	}
	return fmt.Sprint(l.Max)
}
