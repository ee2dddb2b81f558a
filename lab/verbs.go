package lab

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
)

func verbs() []verb {
	return []verb{
		{name: "node", usage: "NAME... [bare=yes]", about: "add nodes; a bare one is a machine outside of the cluster", do: doNode},
		{name: "pod", usage: "NODE/[NAMESPACE/]NAME [sa=NAME] [label=K=V]... [annotation=K=V]... [listen=PORT,...] [port=NAME:PORT]... [app=ARGS] [user=NAME] [grace=TIME] [ready=no] [host=N] [copies=N] [-- COMMAND...]",
			about: "start a pod; listen= runs an echo server, app= the test application, -- any program", do: doPod},
		{name: "ready", usage: "POD yes|no", about: "say whether a pod takes connections of services", do: doReady},
		{name: "service", usage: "[NAMESPACE/]NAME [PORTNAME@]PORT[:TARGET]... [select=K=V]... [address=none|v4|v6]", about: "put a service before pods (label app=NAME if nothing is selected)", do: doService},
		{name: "apply", usage: "FILE...", about: "create or change objects from YAML", do: doApply},
		{name: "delete", usage: "KIND NAME | FILE [grace=TIME]", about: "delete an object, or all in a file", do: doDelete},
		{name: "label", usage: "namespace NAME|pod NAME KEY=VALUE|KEY-...", about: "set or remove labels", do: doLabel},
		{name: "exec", usage: "POD|node/NAME|underlay [user=NAME] [--] COMMAND...", about: "run a program there; the first word app is the test application", do: doExec},
		{name: "connect", usage: "POD HOST:PORT [say=TEXT] [timeout=TIME]", about: "send a line from a pod to an echo server and expect it back", do: doConnect},
		{name: "start", usage: "NAME POD|node/NAME [user=NAME] -- COMMAND... | PROCESS", about: "start a job in the background, or a stopped process of Tacit", do: doStart},
		{name: "stop", usage: "NAME [SIGNAL]", about: "end a job and show what it said, or stop a process of Tacit", do: doStop},
		{name: "wait", usage: "JOB [within=TIME] | enrolled|protected|outside POD... [within=TIME] | ready PROCESS... | gone POD... [within=TIME]", about: "wait until something is so; a pod's name may have a *", do: doWait},
		{name: "kill", usage: "PROCESS|JOB [SIGNAL]", about: "signal a process of Tacit (control, NODE/agent, NODE/proxy) or a job", do: doKill},
		{name: "restart", usage: "PROCESS... [signal=NAME]", about: "end a process of Tacit and wait until its successor is ready", do: doRestart},
		{name: "rollout", usage: "NODE...", about: "replace agent and proxy as a DaemonSet does: the next ones are ready before the old ones end", do: doRollout},
		{name: "cut", usage: "NODE...", about: "take a node off the underlay: packets are lost without a word", do: doCut(false)},
		{name: "heal", usage: "NODE...", about: "put a node back on the underlay", do: doCut(true)},
		{name: "capture", usage: "start NAME NODE[/POD] | stop NAME | grep NAME TEXT | ports NAME A B PORT... | count|tls NAME A B", about: "record packets of a node's uplink, and look into them", do: doCapture, not: true},
		{name: "log", usage: "PROCESS|POD|JOB [REGEXP [TEXT]...] [within=TIME]", about: "show a log, or its lines with all of the words, for which it waits", do: doLog, not: true},
		{name: "metric", usage: "PROCESS NAME [LABEL=VALUE]... [at-least=N|is=N|at-most=N|…=@FILE[+N]] [within=TIME]", about: "show a metric's sum, or wait for a value", do: doMetric, not: true},
		{name: "status", usage: "", about: "one line per pod: enrolled, protected, identity, certificate, connections", do: doStatus},
		{name: "dump", usage: "PROCESS PATH", about: "show an admin page of a process, such as /dump/pods", do: doDump},
	}
}

func doNode(ctx context.Context, c *Cluster, call verbCall) error {
	bare := call.take("bare", "no") == "yes"
	if err := errors.Join(call.want(1, -1), call.done()); err != nil {
		return err
	}
	var g errgroup.Group
	defer g.Wait()
	for _, name := range call.words {
		n, err := c.reserveNode(name, bare)
		if err != nil {
			return err
		}
		g.Go(func() error { return c.addNode(ctx, n) })
	}
	return g.Wait()
}

func doPod(ctx context.Context, c *Cluster, call verbCall) error {
	copies, err := strconv.Atoi(call.take("copies", "0"))
	if err != nil {
		return err
	}
	node, spec, err := c.podSpec(&call)
	if err = errors.Join(err, call.want(1, 1), call.done()); err != nil {
		return err
	}
	if copies == 0 {
		return c.addPod(ctx, node, spec)
	}
	var g errgroup.Group
	g.SetLimit(4)
	for i := range copies {
		one := spec
		one.name = fmt.Sprintf("%s-%d", spec.name, i)
		one.labels, one.annotations = maps.Clone(spec.labels), maps.Clone(spec.annotations)
		g.Go(func() error { return c.addPod(ctx, node, one) })
	}
	return g.Wait()
}

// podSpec reads the words of the verb pod.
func (c *Cluster) podSpec(call *verbCall) (node string, s podSpec, err error) {
	if err := call.want(1, 1); err != nil {
		return "", s, err
	}
	node, name, ok := strings.Cut(call.words[0], "/")
	s.namespace, s.name, _ = strings.Cut(podKey(name), "/")
	if !ok || !validName(s.namespace) || !validName(s.name) {
		return "", s, usageError(fmt.Sprintf("pod %q: want NODE/NAME or NODE/NAMESPACE/NAME", call.words[0]))
	}
	s.account = call.take("sa", "default")
	s.user = call.take("user", "")
	s.unready = call.take("ready", "yes") == "no"
	s.labels = keyValues(append([]string{"app=" + s.name}, call.takeAll("label")...))
	s.annotations = keyValues(call.takeAll("annotation"))
	if s.grace, err = time.ParseDuration(call.take("grace", "5s")); err != nil {
		return "", s, err
	}
	host := call.take("host", "0")
	if s.host, err = strconv.Atoi(host); err != nil {
		return "", s, usageError(fmt.Sprintf("host=%s: want a number", host))
	}
	listen := call.take("listen", "")
	app := call.take("app", "")
	s.ports, err = containerPorts(listen, call.takeAll("port"))
	s.command = podApplication(call.rest, app, listen)
	return node, s, err
}

func podApplication(rest []string, app, listen string) []string {
	switch {
	case len(rest) > 0:
		return rest
	case app != "":
		return append([]string{"app"}, strings.Fields(app)...)
	case listen != "":
		words := []string{"app", "serve"}
		for p := range strings.SplitSeq(listen, ",") {
			words = append(words, "echo:"+p)
		}
		return words
	}
	return nil
}

func containerPorts(listen string, named []string) (out []corev1.ContainerPort, err error) {
	if listen != "" {
		named = append(strings.Split(listen, ","), named...)
	}
	for _, text := range named {
		name, number, ok := strings.Cut(text, ":")
		if !ok {
			name, number = "", text
		}
		n, err := strconv.ParseUint(number, 10, 16)
		if err != nil {
			return nil, fmt.Errorf("port %q: %w", text, err)
		}
		out = append(out, corev1.ContainerPort{Name: name, ContainerPort: int32(n), Protocol: corev1.ProtocolTCP})
	}
	return out, nil
}

func keyValues(words []string) map[string]string {
	m := map[string]string{}
	for _, w := range words {
		k, v, _ := strings.Cut(w, "=")
		m[k] = v
	}
	return m
}

func doReady(ctx context.Context, c *Cluster, call verbCall) error {
	if err := errors.Join(call.want(2, 2), call.done()); err != nil {
		return err
	}
	p, err := c.pod(call.words[0])
	if err != nil {
		return err
	}
	return c.setReady(ctx, p, call.words[1] == "yes")
}

func doExec(ctx context.Context, c *Cluster, call verbCall) error {
	user := call.take("user", "")
	if err := errors.Join(call.want(1, 1), call.done()); err != nil {
		return err
	}
	if len(call.rest) == 0 {
		return usageError("no command")
	}
	at, err := c.place(call.words[0])
	if err != nil {
		return err
	}
	return c.exec(ctx, call, at, user, call.rest)
}

func doConnect(ctx context.Context, c *Cluster, call verbCall) error {
	say, timeout := call.take("say", "hello"), call.take("timeout", "10s")
	if err := errors.Join(call.want(2, 2), call.done()); err != nil {
		return err
	}
	at, err := c.place(call.words[0])
	if err != nil {
		return err
	}
	return c.exec(ctx, call, at, "", []string{"app", "connect", "--say", say, "--timeout", timeout, call.words[1]})
}

func doStart(ctx context.Context, c *Cluster, call verbCall) error {
	user := call.take("user", "")
	if err := errors.Join(call.want(1, 2), call.done()); err != nil {
		return err
	}
	if k := c.kept(call.words[0]); k != nil {
		if err := k.begin(ctx); err != nil {
			return err
		}
		return c.awaitReady(ctx, k.name)
	}
	if len(call.words) != 2 || len(call.rest) == 0 {
		return usageError(fmt.Sprintf("%s is no process of Tacit, and no command is given", call.words[0]))
	}
	at, err := c.place(call.words[1])
	if err != nil {
		return err
	}
	return c.begin(call.words[0], at, user, call.dir, call.rest)
}

func doStop(ctx context.Context, c *Cluster, call verbCall) error {
	if err := errors.Join(call.want(1, 2), call.done()); err != nil {
		return err
	}
	s, err := signalNamed(append(call.words, "TERM")[1])
	if err != nil {
		return err
	}
	if k := c.kept(call.words[0]); k != nil {
		return k.stop(ctx, s)
	}
	return c.finish(ctx, call, call.words[0], s, jobPatience)
}

func doKill(ctx context.Context, c *Cluster, call verbCall) error {
	if err := errors.Join(call.want(1, 2), call.done()); err != nil {
		return err
	}
	s, err := signalNamed(append(call.words, "KILL")[1])
	if err != nil {
		return err
	}
	if k := c.kept(call.words[0]); k != nil {
		return k.signal(s)
	}
	c.mu.Lock()
	j := c.jobs[call.words[0]]
	c.mu.Unlock()
	if j == nil {
		return fmt.Errorf("there is no process or job %s", call.words[0])
	}
	return j.signal(s)
}

func signalNamed(name string) (syscall.Signal, error) {
	if s := unix.SignalNum("SIG" + strings.TrimPrefix(name, "SIG")); s != 0 {
		return s, nil
	}
	return 0, usageError("no signal " + name)
}

func doRestart(ctx context.Context, c *Cluster, call verbCall) error {
	s, err := signalNamed(call.take("signal", "TERM"))
	if err = errors.Join(err, call.want(1, -1), call.done()); err != nil {
		return err
	}
	for _, name := range call.words {
		k := c.kept(name)
		if k == nil {
			return fmt.Errorf("there is no process %s", name)
		}
		if err := k.again(ctx, s); err != nil {
			return err
		}
		if err := c.awaitReady(ctx, name); err != nil {
			return err
		}
	}
	return nil
}

func doCut(in bool) func(context.Context, *Cluster, verbCall) error {
	return func(_ context.Context, c *Cluster, call verbCall) error {
		if err := errors.Join(call.want(1, -1), call.done()); err != nil {
			return err
		}
		for _, name := range call.words {
			n, err := c.node(name)
			if err != nil {
				return err
			}
			if err := plug(n, in); err != nil {
				return err
			}
		}
		return nil
	}
}

func doLabel(_ context.Context, c *Cluster, call verbCall) error {
	// KEY=VALUE was read as an option, KEY- as a word.
	if err := call.want(2, -1); err != nil {
		return err
	}
	kind, name := call.words[0], call.words[1]
	change := func(labels map[string]string) map[string]string {
		for _, o := range call.options {
			labels[o.key] = o.value
		}
		for _, w := range call.words[2:] {
			delete(labels, strings.TrimSuffix(w, "-"))
		}
		return labels
	}
	switch {
	case slices.Contains([]string{"namespace", "ns"}, kind):
		return c.labelNamespace(name, change)
	case kind == "pod":
		p, err := c.pod(name)
		if err != nil {
			return err
		}
		return c.writePod(p, func() { p.labels = change(p.labels) })
	}
	return usageError("no label for " + kind)
}

func (c *Cluster) labelNamespace(name string, change func(map[string]string) map[string]string) error {
	if err := c.ensureAccount(name, ""); err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	o := c.namespaces[name]
	o.Labels = change(o.Labels)
	return c.objects.put("Namespace", "", name, o)
}
